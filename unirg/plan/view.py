"""A plan as tables."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(plan: dict[str, Any]) -> None:
    """Prints the plan."""
    console = Console()
    parts = {name: count for name, count in plan["parameters"].items() if count}
    counted = ", ".join(f"{name} {_count(count)}" for name, count in parts.items())
    total = sum(parts.values())
    console.print(f"[bold]{plan['recipe']}[/bold]: {plan['policy']}, {_count(total)} parameters ({counted}); "
                  f"{_count(plan['trained_parameters'])} trained", highlight=False, soft_wrap=True)  # fmt: skip
    extra = f" and {plan['sampling_gpus']} for sampling" if plan["sampling_gpus"] else ""
    console.print(
        f"{plan['nodes']} x {plan['gpus']} {plan['machine']['name']}{extra}, {plan['strategy']}, sampling with "
        f"{plan['engine']}",
        highlight=False,
        soft_wrap=True,
    )
    for stage in plan["stages"]:
        console.print()
        console.print(_memory(stage, plan["machine"]["memory"]))
        console.print(_phases(stage))
        console.print(_beside(stage), highlight=False, soft_wrap=True)
        said = f"{stage['name']}: {_readable(stage['run_hours'] * 3600)}, {_gpu_hours([stage])}; "
        console.print(f"{said}bound by {stage['bound']}", highlight=False, soft_wrap=True)
        if stage.get("try"):
            console.print(f"[red]does not fit[/red]; try {'; '.join(stage['try'])}", highlight=False, soft_wrap=True)
        unknown = [*stage["phases"].get("rewards", {}).get("unknown", [])]
        unknown += stage["beside_steps"].get("evaluations", {}).get("unknown", [])
        if unknown:
            names = ", ".join(dict.fromkeys(unknown))
            said = f"[yellow]not counted[/yellow]: {names}; give --reward-seconds {unknown[0]}=SECONDS"
            console.print(said, highlight=False, soft_wrap=True)
    seconds = sum(stage["run_hours"] for stage in plan["stages"]) * 3600
    said = f"{_readable(seconds)}, {_gpu_hours(plan['stages'])}; at most {_gb(plan['disk'])} GB on disk"
    console.print(f"\n[bold]all stages, one after another: {said}[/bold]", highlight=False, soft_wrap=True)
    for text in plan["assumptions"]:
        console.print(f"- {text}", highlight=False, soft_wrap=True)


def _beside(stage: dict[str, Any]) -> str:
    """Steps, evaluations and checkpoints: how many, how long."""
    parts = [f"{stage['steps']} steps of {_readable(stage['step_seconds'])}"]
    for name, of in stage["beside_steps"].items():
        if of["count"] or of["seconds"]:
            parts.append(f"{of['count']} {name if of['count'] != 1 else name[:-1]} {_readable(of['seconds'])}")
    return f"{stage['name']}: {', '.join(parts)}"


def _gpu_hours(stages: Sequence[dict[str, Any]]) -> str:
    trainers, samplers = (sum(stage[key] for stage in stages) for key in ("gpu_hours", "sampling_gpu_hours"))
    if not samplers:
        return f"{trainers:,.0f} GPU hours"
    return f"{trainers + samplers:,.0f} GPU hours ({trainers:,.0f} training, {samplers:,.0f} sampling)"


def _memory(stage: dict[str, Any], memory: float) -> Table:
    moments = stage["memory"]
    table = Table("GB of one GPU", title=f"{stage['name']} ({stage['kind']}): memory", title_justify="left")
    for moment in moments:
        table.add_column(moment, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(_gb(parts[part]) if part in parts else "" for parts in moments.values()))
    table.add_section()
    table.add_row("together", *(_gb(sum(parts.values())) for parts in moments.values()))
    verdict = "fits" if stage["fits"] else "does not fit"
    table.caption = f"{_gb(stage['memory_needed'])} needed of {_gb(memory)} GB: {verdict}"
    return table


def _phases(stage: dict[str, Any]) -> Table:
    table = Table("a step, all ranks", title=f"{stage['name']}: time", title_justify="left")
    for column in ("tokens", "TFLOPs", "without sharing", "seconds", "bound by"):
        table.add_column(column, justify="right")
    for name, phase in stage["phases"].items():
        unshared = stage["unshared_flops"].get(name)
        table.add_row(
            name,
            f"{phase['tokens']:,.0f}" if phase["tokens"] else "",
            f"{phase['flops'] / 1e12:,.3g}" if phase["flops"] else "",
            f"{unshared / 1e12:,.3g}" if unshared else "",
            f"{phase['seconds']:.3g}",
            phase["bound"],
        )
    return table


def _count(numbers: float) -> str:
    return f"{numbers / 1e9:.2f}B" if numbers >= 1e9 else f"{numbers / 1e6:.2f}M"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"


def _readable(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{math.floor(seconds / 86400 * 10) / 10} days"
