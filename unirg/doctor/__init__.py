"""`unirg doctor`: is this node (or are these nodes) fit to run a recipe? What is wrong, in words.

unirg doctor                                     this node: versions, GPUs, memory, network, collectives
unirg doctor recipes/demo.yaml                   and what the recipe needs: model, data, rewards, servers, disk
torchrun --nnodes 2 ... -m unirg doctor RECIPE   and every node beside it: do they reach each other, do they agree
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from unirg.doctor.finding import Finding
from unirg.doctor.network import (
    agreement,
    check_collective,
    check_environment,
    check_interfaces,
    check_port,
    gather_findings,
    join,
    waited_for,
)
from unirg.doctor.node import check_cpu, check_gpus, check_memory, check_temporary, check_versions
from unirg.doctor.recipe import check_recipe
from unirg.errors import UserError
from unirg.recipe.load import load_recipe

SIGNS = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(recipe: Path | None, overrides: Sequence[str] = (), *, as_json: bool = False) -> int:
    """Prints what was found, a line each, and returns the exit status: 1 where something fails, else 0.

    Under torchrun a rank of each node checks it, and rank 0 prints: what all nodes say alike stands once. Raises
    UserError where the recipe itself cannot be read, where torchrun's variables are not those of a rank, or where the
    other ranks cannot be reached (it says which address and which variable).
    """
    check_environment()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
    findings: list[Finding] = []
    console = Console(stderr=True, quiet=as_json or int(os.environ.get("RANK", "0")) > 0)
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_versions,
        check_gpus,
        check_cpu,
        check_memory,
        check_temporary,
    ]
    checks += [check_interfaces] + [check_port] * (ranks == 1)
    if recipe is not None and first_of_node:
        load_recipe(recipe, overrides)  # ranks that meet would wait for one that cannot read it
    if ranks > 1:
        with console.status("ranks meet"):
            join()
    with waited_for() if ranks > 1 else nullcontext():
        if first_of_node:
            with console.status("looking at the node"):
                for check in checks:
                    findings += check()
        if recipe is not None and first_of_node:
            with console.status("looking at the recipe's model, data and rewards"):
                findings += check_recipe(recipe, overrides)
    with console.status("ranks talk to each other"):
        findings += check_collective()
    shown = findings
    if ranks > 1:
        by_host = gather_findings(socket.gethostname(), findings)
        if by_host is None:
            return 0
        shown = agreement(by_host)
    if as_json:
        print(json.dumps([asdict(finding) for finding in shown]))
    else:
        _print(shown)
    return int(any(finding.level == "fail" for finding in shown))


def _print(findings: Sequence[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for area in dict.fromkeys(finding.area for finding in findings):
        console.print(f"[bold]{area}[/bold]")
        for finding in findings:
            if finding.area == area:
                console.print(f"  {SIGNS[finding.level]} ", end="")
                console.print(finding.text, markup=False)
    counts = {level: sum(finding.level == level for finding in findings) for level in SIGNS}
    console.print(f"{counts['fail']} failed, {counts['warn']} to look at, {counts['ok']} in order")


__all__ = ["Finding", "UserError", "doctor"]
