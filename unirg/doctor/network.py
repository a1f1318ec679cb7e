"""What lies between ranks: interfaces, ports, and a collective that is really run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from unirg.doctor.finding import Finding
from unirg.errors import UserError

AREA = "network"
SECONDS = 60
"""How long ranks wait for each other here."""
HOURS = 12
"""How long they wait for a rank that looks at its node: a recipe may have many films, and rewards that load long."""
MIB = 16
"""Size of the tensor that ranks add up."""
PORT = 29500
"""torchrun's own."""


def check_environment() -> None:
    """Raises UserError where the variables that torchrun sets are not those of a rank."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    odd = [f"{name}={os.environ[name]}" for name in names if not os.environ.get(name, "0").isdigit()]
    if odd or int(os.environ.get("MASTER_PORT", PORT)) > 65535:
        said = ", ".join(odd) or f"MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(f"{said}: expected a whole number, of a port at most 65535; torchrun sets it, or unset it")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} and no {', '.join(missing)}: start the ranks with torchrun ... -m "
            "unirg doctor, or unset WORLD_SIZE"
        )


def check_interfaces() -> Iterator[Finding]:
    """The interfaces that the environment names exist, and the address of the first rank is known."""
    known = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        wanted = os.environ.get(variable)
        if wanted is None:
            continue
        names = [name.lstrip("^=") for name in wanted.split(",")]
        # NCCL takes prefixes (eth), and ^ for all but these.
        missing = [name for name in names if not any(interface.startswith(name) for interface in known)]
        if missing and not wanted.startswith("^"):
            said = f"{variable} names {', '.join(missing)}; this node has {', '.join(known)}"
            yield Finding(AREA, "fail", said)
        else:
            yield Finding(AREA, "ok", f"{variable}={wanted}")
    master = os.environ.get("MASTER_ADDR")
    if master is not None:
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(master, None)}
            yield Finding(AREA, "ok", f"MASTER_ADDR {master} is {', '.join(sorted(map(str, found)))}")
        except OSError as error:
            yield Finding(AREA, "fail", f"MASTER_ADDR {master} is not known here ({error}); use the IP address")


def check_port() -> Iterator[Finding]:
    """The port at which torchrun's first rank would listen is free."""
    port = int(os.environ.get("MASTER_PORT", PORT))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            said = f"port {port} cannot be listened on ({error.strerror}): is another job here?"
            other = (
                "give torchrun --standalone on one node, --master-port (recipes/launch/torchrun.sh: PORT) on several"
            )
            yield Finding(AREA, "warn", f"{said} {other}")
        else:
            yield Finding(AREA, "ok", f"port {port} is free")


def join() -> None:
    """This rank meets the others that torchrun started. Raises UserError where they do not come."""
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=SECONDS)
        )
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()} met not all {os.environ.get('WORLD_SIZE')} ranks "
            f"at {at} within {SECONDS} s: {str(error).splitlines()[0]}. Is the address reachable from here, is the "
            "port open between the nodes, does GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) name the interface between them?"
        ) from error


@contextmanager
def waited_for() -> Iterator[None]:
    """All ranks end it together. Raises UserError where one of them is gone by then."""
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=HOURS))
    yield
    try:
        dist.barrier(patient)
    except RuntimeError as error:
        raise UserError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: another rank ended while it looked at its node, and "
            f"said why ({str(error).splitlines()[0]})"
        ) from error


def check_collective() -> Iterator[Finding]:
    """Ranks add up a tensor, which must be right: those that torchrun started, or else as many processes of this node
    as there are GPUs, at least two."""
    if dist.is_initialized():
        yield from all_reduced()
        return
    ranks = max(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            [*command, "-m", "unirg.doctor.network"],
            capture_output=True,
            text=True,
            timeout=3 * SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        yield Finding(AREA, "fail", f"{ranks} processes of this node did not meet within {3 * SECONDS} s")
        return
    found = [
        Finding(**entry) for line in ended.stdout.splitlines() if line.startswith("[{") for entry in json.loads(line)
    ]
    if not found:
        last = (ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1]
        found = [Finding(AREA, "fail", f"{ranks} processes of this node cannot meet: {last}")]
    yield from found


def all_reduced() -> Iterator[Finding]:
    """All ranks add up `MIB` MiB, five times, on each backend; rank 0 says how long it took."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()))
    for device in devices:
        backend = "gloo" if device.type == "cpu" else f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        tensor = torch.full((MIB << 18,), float(rank + 1), device=device)
        seconds = []
        for _ in range(5):
            tensor.fill_(rank + 1)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(tensor[0].item() * 0 + time.perf_counter() - started)  # .item() waits for the device
        right = bool((tensor == ranks * (ranks + 1) / 2).all())
        if not right:
            yield Finding(AREA, "fail", f"{backend}: {ranks} ranks added up wrongly on rank {rank}")
        elif rank == 0:
            # Of an all-reduce each rank sends and takes in 2 (n - 1) / n of the tensor.
            rate = 2 * (ranks - 1) / ranks * MIB / 1024 / min(seconds)
            yield Finding(AREA, "ok", f"{backend}: {ranks} ranks add up {MIB} MiB rightly, {rate:.2f} GiB/s each way")


def gather_findings(host: str, findings: Sequence[Finding]) -> dict[str, list[Finding]] | None:
    """All ranks' findings by host, on rank 0; None on the others. Ends the process group."""
    gathered: list[tuple[str, list[Finding]]] | None = (
        [("", [])] * dist.get_world_size() if dist.get_rank() == 0 else None
    )
    dist.gather_object((host, list(findings)), gathered)
    dist.destroy_process_group()
    if gathered is None:
        return None
    by_host: dict[str, list[Finding]] = {}
    for name, found in gathered:
        by_host.setdefault(name, []).extend(found)
    return by_host


def agreement(by_host: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of all hosts: what all say alike once, the rest with the host's name; and where hosts differ in
    versions, that they do."""
    everyone = list(by_host.values())
    merged = [finding for finding in everyone[0] if all(finding in other for other in everyone)]
    for host, findings in by_host.items():
        own = [finding for finding in findings if finding not in merged]
        merged += [Finding(f.area, f.level, f"{host}: {f.text}") for f in own]
    versions = {tuple(f.text for f in findings if f.area == "versions" and f.level == "ok") for findings in everyone}
    if len(versions) > 1:
        merged.append(
            Finding("versions", "fail", "nodes have different versions (above): numbers would differ by rank")
        )
    return merged


if __name__ == "__main__":  # what `check_collective` starts
    from dataclasses import asdict

    join()
    said = [asdict(finding) for finding in all_reduced()]
    dist.barrier()
    dist.destroy_process_group()
    if said:
        print(json.dumps(said), flush=True)
    os._exit(0)  # the interpreter's own end may meet one of torch's threads, and abort: torchrun then stops the others
