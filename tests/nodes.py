"""Hosts of a cluster, on one machine: network namespaces that see each other over a bridge and share the files."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOST = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0"}
"""The environment of what runs on a host."""


@dataclass(frozen=True)
class Node:
    """A host: its namespace and its address. Its network interface is `eth0`."""

    name: str
    address: str

    def start(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        """Starts a command on this host; its output can be read where `options` do not say otherwise."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=cwd,
            env=os.environ | HOST | (environment or {}),
            text=True,
            **output,
        )

    def plug(self, state: str) -> None:
        """Its cable: `up` or `down`."""
        _ip("-n", self.name, "link", "set", "eth0", state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def refused() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if shutil.which("ip") is None:
        return "no `ip` command (iproute2)"
    probe = f"unirg-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not allowed here ({done.stderr.strip()}); they need root"
    _ip("netns", "del", probe)
    return None


@contextmanager
def cluster(count: int) -> Iterator[list[Node]]:
    """So many hosts, 10.77.0.1 and on, with nothing else on their network. Skips the test where that is not allowed."""
    if why := refused():
        pytest.skip(why)
    switch = f"unirg-{os.getpid()}-switch"
    nodes = [Node(f"unirg-{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in range(count)]
    names = [switch, *(node.name for node in nodes)]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for i, node in enumerate(nodes):
            _ip("link", "add", "eth0", "netns", node.name, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge0", "up")
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
            node.plug("up")
        yield nodes
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for process in left:  # of a test that failed
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
