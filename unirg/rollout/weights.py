"""The policy's weights on their way to a rollout engine: gathered, merged, streamed over TCP.

The trainer listens on the address that faces the server, on a port that it gives out with a one-time token; each of the
server's workers connects, proves itself and reads tensors in the order in which they are gathered. One parameter is
whole in memory at a time. It is the same on one host and between hosts, and needs no device.

TRL's `VLLMGeneration` and `VLLMClient` do less here: they know of shards only from accelerate's plug-in, merge adapters
into the base weights and subtract them again (which does not give the same weights back, so that a resumed run would
part from an uninterrupted one), transfer by NCCL alone, and wait without a limit.
"""

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from unirg import zero3
from unirg.distributed import whole_tensor

PEFT_PREFIX = "base_model.model."
HANDSHAKE = 5.0
"""Seconds that whoever connects for weights has to show the token."""


@torch.no_grad()
def named_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under the name that a model folder has it by, in `dtype`, on its device, tied ones once, adapters
    merged. (In memory transformers calls some otherwise, and stacks the experts of a mixture in one tensor.)

    Shards are gathered one parameter at a time, which is a collective: all ranks must go through all of them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in model.named_parameters():
        if adapted and f".{model.prefix}" in name:  # the adapters' own, which the weights below have in them
            continue
        weight = whole_tensor(parameter)
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None and name.endswith(".base_layer.weight"):
            for adapter in layer.active_adapters:
                with zero3.gathered(layer.parameters()):
                    weight = weight.float() + whole_tensor(layer.get_delta_weight(adapter)).float()
        own = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        yield from revert_weight_conversion(base, {own: weight.detach().to(dtype)}).items()


class WeightStream:
    """The trainer's end of a stream of weights to one server with so many workers. Faults are OSErrors."""

    def __init__(self, host: str, port: int, workers: int, timeout: float) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing: asks which of our addresses faces the server
            mine = probe.getsockname()[0]
        self.listener = socket.create_server((mine, 0), backlog=workers + 16)  # not only workers may come
        self.address: tuple[str, int] = self.listener.getsockname()
        self.token = secrets.token_hex(16)
        self.workers, self.timeout = workers, timeout
        self.connections: list[socket.socket] = []

    def accept(self, gave_up: Callable[[], bool]) -> None:
        """Waits for every worker; `gave_up` tells that the server will not connect any more."""
        deadline = time.monotonic() + self.timeout
        self.listener.settimeout(0.1)
        while len(self.connections) < self.workers:
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                if gave_up() or time.monotonic() > deadline:
                    raise ConnectionError(
                        f"{len(self.connections)} of {self.workers} workers connected to {self.address[0]} for weights"
                    ) from None
                continue
            connection.settimeout(HANDSHAKE)
            try:
                mine = hmac.compare_digest(_exactly(connection, len(self.token)), self.token.encode())
            except OSError:  # whoever that was, a worker may be next
                mine = False
            if mine:
                connection.settimeout(self.timeout)
                self.connections.append(connection)
            else:
                connection.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Sends one tensor."""
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
        payload = _bytes(tensor.cpu().contiguous())
        for connection in self.connections:
            connection.sendall(struct.pack("!I", len(header)) + header)
            connection.sendall(payload)

    def end(self) -> None:
        """Says that this was all: without it the workers take the stream for torn."""
        for connection in self.connections:
            connection.sendall(struct.pack("!I", 0))

    def break_off(self) -> None:
        """Ends a `write` in another thread."""
        for connection in self.connections:
            with suppress(OSError):  # it may be at its end
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes whatever is open."""
        for opened in (*self.connections, self.listener):
            opened.close()


def receive_weights(
    host: str, port: int, token: str, timeout: float
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The worker's end: the tensors that the trainer sends, until it says that these were all. Raises OSError where the
    stream breaks off or nothing comes for `timeout` seconds."""
    with socket.create_connection((host, port), timeout=timeout) as connection:
        connection.sendall(token.encode())
        while length := struct.unpack("!I", _exactly(connection, 4))[0]:
            name, dtype, shape = json.loads(_exactly(connection, length))
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            _fill(connection, _bytes(empty))
            yield name, empty


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    _fill(connection, memoryview(buffer))
    return bytes(buffer)


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other end closed the stream of weights before its end")
        view = view[count:]
