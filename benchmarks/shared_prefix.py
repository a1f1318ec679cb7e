"""One GRPO update of one group: our packed forward beside our dense one and TRL 1.16's GRPOTrainer.

    python benchmarks/shared_prefix.py --quick                  # the headline setting, under a minute on one core
    python benchmarks/shared_prefix.py --json > figures.json    # every setting, about an hour
    python benchmarks/shared_prefix.py --device cuda            # Qwen3-VL 2B's shapes, random weights, bf16

The sides (`group_update.py`) work in one process on the same rows, in turns. An update is log-probs, loss and
backward; the optimiser's step is the same on all sides and left out. `token_bound` is G(P + R) / (P + GR), what sharing
a prompt of P tokens among G answers of R tokens can save of the language model's tokens in one pass.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is silent only if told before it is loaded

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from group_update import POLICIES, Build, Rows, Setting, Side, build_sides, draw, update
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unirg.grpo.choose import fastest_kernel
from unirg.grpo.prefix_attention import Kernel, PackedStudy

PROMPTS = ((150, 1, 10), (300, 1, 16), (450, 1, 20), (900, 2, 20))  # tokens, films, image tokens along a film's side
GROUPS = (4, 8, 16)
HEADLINE = Setting(300, 1, 16, 8, 75, 75)
SMALL = [HEADLINE, replace(HEADLINE, group=16), *(Setting(*prompt, group) for prompt in PROMPTS for group in GROUPS)]
# A film of 512 pixels with its context; two such films with the prior report.
REAL = [Setting(450, 1, 16, 16, 120, 120), Setting(900, 2, 16, 16, 120, 120)]
HEADLINE_FIGURES = (
    "ratio_vs_trl",
    "ratio_vs_dense",
    "token_saving",
    "token_bound",
    "max_logp_diff",
    "max_grad_rel_diff",
)


def timed(side: Side, rows: Rows) -> dict[str, float]:
    """Seconds of each phase of an update: CPU time of this process; on a GPU wall time, until it is done."""
    cuda = side.model.device.type == "cuda"
    seconds = {}

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else measure.clock()

    @contextlib.contextmanager
    def watch(phase: str) -> Iterator[None]:
        started = now()
        yield
        seconds[phase] = now() - started

    update(side, rows, watch)
    side.model.zero_grad(set_to_none=True)
    return seconds


def observe(side: Side, rows: Rows) -> dict[str, Any]:
    """One update from outside; its gradients stay on the model.

    `tokens` and `tower_tokens` entered the first layer of the language model and of the vision tower. `peak_bytes` are
    the most that tensors held at once beyond what was there before: activations, gradients, copies of inputs, not
    weights; on a CPU by the allocations that torch's profiler sees, on a GPU by its allocator.
    """
    model, counts = side.model.model, {"tokens": 0, "tower_tokens": 0}

    def counting(name: str) -> Callable[..., None]:
        def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[name] += (args[0] if args else kwargs["hidden_states"]).shape[:-1].numel()

        return add

    layers = {"tokens": model.language_model.layers[0], "tower_tokens": model.visual.blocks[0]}
    handles = [layer.register_forward_pre_hook(counting(name), with_kwargs=True) for name, layer in layers.items()]
    side.model.zero_grad(set_to_none=True)
    if side.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps_GT = update(side, rows)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            logps_GT = update(side, rows)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    for handle in handles:
        handle.remove()
    return counts | {"peak_bytes": peak, "logps_GT": logps_GT}


def count_flops(side: Side, rows: Rows) -> dict[str, int]:
    """Floating point operations as torch counts them in matrix products and attention, none left out for a mask.

    `decoder` and `head` are the language model's, forward and backward; `tower` is the vision tower's forward.
    """
    forward = {"tower": 0, "head": 0}
    tower, head = side.model.model.visual, side.model.lm_head
    tower.requires_grad_(False)  # its backward cannot be told from the language model's otherwise
    # On a CPU torch counts nothing for its fused attention: the plain one does the same sums.
    plain = sdpa_kernel(SDPBackend.MATH) if side.model.device.type == "cpu" else contextlib.nullcontext()
    with plain, FlopCounterMode(display=False) as counter:

        def before(name: str) -> Callable[..., None]:
            return lambda *_: forward.update({name: forward[name] - counter.get_total_flops()})

        def after(name: str) -> Callable[..., None]:
            return lambda *_: forward.update({name: forward[name] + counter.get_total_flops()})

        handles = [tower.register_forward_pre_hook(before("tower")), tower.register_forward_hook(after("tower"))]
        handles += [head.register_forward_pre_hook(before("head")), head.register_forward_hook(after("head"))]
        update(side, rows)
        total = counter.get_total_flops()
    for handle in handles:
        handle.remove()
    tower.requires_grad_(True)
    of_head = 3 * forward["head"]  # a linear layer's backward is two products of its forward's size
    return {"decoder": total - forward["tower"] - of_head, "head": of_head, "tower": forward["tower"]}


def compare(build: Build, kernel: Kernel, setting: Setting, rows: Rows, repeats: int) -> dict[str, Any]:
    """Every figure of one setting; seconds are medians over `repeats` rounds in which the sides take turns."""
    sides = build(rows, kernel)
    seen: dict[str, dict[str, Any]] = {}
    gradients: dict[str, torch.Tensor] = {}
    worst = 0.0
    for name, side in sides.items():  # also warms the side up
        seen[name] = observe(side, rows)
        for parameter, weight in side.model.named_parameters():
            if weight.grad is not None and name == "packed":
                gradients[parameter] = weight.grad.float().clone()
            elif weight.grad is not None and name == "dense":
                gap = (gradients.pop(parameter) - weight.grad).norm() / weight.grad.float().norm().clamp(min=1e-30)
                worst = max(worst, gap.item())
        side.model.zero_grad(set_to_none=True)
    assert not gradients, f"gradients that the dense side does not have: {', '.join(gradients)}"
    counted = build(rows, "sdpa")  # the kernel that torch has a formula for
    flops = {name: count_flops(counted[name], rows) for name in ("packed", "dense")}
    rounds = [{name: timed(side, rows) for name, side in sides.items()} for _ in range(repeats)]
    seconds = {
        name: {phase: statistics.median(r[name][phase] for r in rounds) for phase in rounds[0][name]} for name in sides
    }
    totals = {name: [sum(r[name].values()) for r in rounds] for name in sides}
    whole = {name: statistics.median(values) for name, values in totals.items()}
    mean = statistics.mean(len(answer) for answer in rows.answers)
    group, prompt = setting.group, setting.prompt
    bound = group * (prompt + mean) / (prompt + group * mean)
    logps = {name: own.pop("logps_GT") for name, own in seen.items()}
    saving = flops["dense"]["decoder"] / flops["packed"]["decoder"]
    return {
        "prompt": prompt,
        "films": setting.films,
        "film_tokens": setting.side**2,
        "group": group,
        "answers": [len(answer) for answer in rows.answers],
        "mean_answer": mean,
        "ratio_vs_trl": whole["trl"] / whole["packed"],
        "ratio_vs_trl_range": _range(totals["trl"], totals["packed"]),
        "ratio_vs_trl_one_pass": (whole["trl"] - seconds["trl"]["old log-probs"]) / whole["packed"],
        "ratio_vs_dense": whole["dense"] / whole["packed"],
        "ratio_vs_dense_range": _range(totals["dense"], totals["packed"]),
        "token_saving": seen["dense"]["tokens"] / seen["packed"]["tokens"],
        "token_bound": bound,
        "flop_saving": saving,
        "flop_saving_of_bound": saving / bound,
        "flop_saving_with_head": (flops["dense"]["decoder"] + flops["dense"]["head"])
        / (flops["packed"]["decoder"] + flops["packed"]["head"]),
        "memory_vs_trl": seen["trl"]["peak_bytes"] / seen["packed"]["peak_bytes"],
        "memory_vs_dense": seen["dense"]["peak_bytes"] / seen["packed"]["peak_bytes"],
        "max_logp_diff": (logps["packed"] - logps["dense"]).abs().max().item(),
        "max_grad_rel_diff": worst,
        "trl_max_logp_diff": (logps["trl"] - logps["dense"]).abs().max().item(),
        "seconds": seconds,
        "update_seconds": whole,
        "flops": flops,
        **{what: {name: own[what] for name, own in seen.items()} for what in ("tokens", "tower_tokens", "peak_bytes")},
    }


def _range(theirs: list[float], ours: list[float]) -> list[float]:
    ratios = [a / b for a, b in zip(theirs, ours)]
    return [min(ratios), max(ratios)]


def in_parts(build: Build, kernel: Kernel, rows: Rows, repeats: int) -> list[dict[str, Any]]:
    """The packed update of one group whole and in parts, each with the prompt forwarded again."""
    results = []
    for parts in (1, 2, 4):
        size = len(rows.answers) // parts
        cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
        pieces = [Rows(rows.prompt, rows.answers[cut], rows.advantages_G[cut]) for cut in cuts]
        done = [(build(piece, kernel)["packed"], piece) for piece in pieces]
        seen = [observe(*one) for one in done]
        seconds = statistics.median(sum(sum(timed(*one).values()) for one in done) for _ in range(repeats))
        peak = max(own["peak_bytes"] for own in seen)
        tokens = sum(own["tokens"] for own in seen)
        results.append({"parts": parts, "seconds": seconds, "peak_bytes": peak, "tokens": tokens})
    return results


def run(name: str, device: str, kernel: Kernel | None, settings: list[Setting], repeats: int) -> dict[str, Any]:
    """Every setting under one policy; where there are several, also the first one's prompt with 16 answers in parts."""
    build, policy = build_sides(name, device)

    def chosen(rows: Rows) -> Kernel:
        study = PackedStudy(0, len(rows.prompt), tuple(len(answer) - 1 for answer in rows.answers))
        kernels: list[Kernel] = ["sdpa", "flex", "flash"] if device == "cuda" else ["sdpa"]
        return kernel or fastest_kernel(policy, (study,), kernels, lambda text: print(text, file=sys.stderr))

    results = []
    for setting in settings:
        rows = draw(setting, policy)
        own = chosen(rows)
        results.append({"policy": name, "kernel": own} | compare(build, own, setting, rows, repeats))
        print(f"{name} {setting}: {results[-1]['ratio_vs_trl']:.2f}, {results[-1]['ratio_vs_dense']:.2f}", flush=True)
    if len(settings) == 1:
        return {"settings": results, "parts": []}
    rows = draw(replace(settings[0], group=16), policy)
    return {"settings": results, "parts": in_parts(build, chosen(rows), rows, repeats)}


def show(name: str, results: dict[str, Any], unit: str) -> None:
    """Two tables of a policy's settings and one of a group in parts."""
    speed = Table("P", "R", "G", title=f"{name}: an update, {unit}")
    for column in ("packed, s", "dense, s", "TRL, s", "vs dense", "vs TRL", "vs TRL, one pass"):
        speed.add_column(column, justify="right")
    work = Table("P", "R", "G", title=f"{name}: what is saved against the dense path")
    for column in ("bound", "tokens", "FLOPs", "of bound", "MB", "memory", "vs TRL", "differs by"):
        work.add_column(column, justify="right")
    for s in results["settings"]:
        key = (str(s["prompt"]), f"{min(s['answers'])}-{max(s['answers'])}", str(s["group"]))
        seconds = [f"{s['update_seconds'][side]:.2f}" for side in ("packed", "dense", "trl")]
        ratios = (s["ratio_vs_dense"], s["ratio_vs_trl"], s["ratio_vs_trl_one_pass"])
        speed.add_row(*key, *seconds, *(f"{ratio:.2f}" for ratio in ratios))
        saved = (f"{s['token_bound']:.2f}", f"{s['token_saving']:.2f}", f"{s['flop_saving']:.2f}")
        memory = (f"{s['peak_bytes']['packed'] / 1e6:.0f}", f"{s['memory_vs_dense']:.2f}", f"{s['memory_vs_trl']:.2f}")
        work.add_row(*key, *saved, f"{s['flop_saving_of_bound']:.0%}", *memory, f"{s['max_logp_diff']:.1e}")
    parts = Table("parts", title=f"{name}: a group of 16 in parts, prompt {results['settings'][0]['prompt']}")
    for column in ("s", "peak, MB", "tokens"):
        parts.add_column(column, justify="right")
    for part in results["parts"]:
        parts.add_row(
            str(part["parts"]), f"{part['seconds']:.2f}", f"{part['peak_bytes'] / 1e6:.0f}", str(part["tokens"])
        )
    for table in (speed, work, parts) if results["parts"] else (speed, work):
        Console().print(table)


def plot(settings: list[dict[str, Any]], path: Path) -> None:
    """Measured ratios against prompt length, a colour for each group size, and what sharing tokens alone can give."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay text, which is smaller
    import matplotlib.pyplot as plt

    grid = [s for s in settings if len(set(s["answers"])) > 1]
    policies = list(dict.fromkeys(s["policy"] for s in grid))
    figure, axes = plt.subplots(
        len(policies), 2, figsize=(9, 3.4 * len(policies)), squeeze=False, sharex=True, layout="constrained"
    )
    for row, policy in zip(axes, policies):
        for axis, side, title in zip(row, ("trl", "dense"), ("TRL's two passes", "our dense pass")):
            for colour, group in zip(("tab:blue", "tab:orange", "tab:green"), GROUPS):
                own = [s for s in grid if s["policy"] == policy and s["group"] == group]
                prompts = [s["prompt"] for s in own]
                axis.plot(prompts, [s[f"ratio_vs_{side}"] for s in own], "o-", color=colour, label=f"G = {group}")
                axis.plot(prompts, [s["token_bound"] for s in own], ":", color=colour)
            axis.plot([], [], "k:", label="G(P+R) / (P+GR)")
            axis.set_title(f"{policy}: {title} / packed", fontsize=10)
            axis.set_xticks([prompt for prompt, _, _ in PROMPTS])
            axis.set_ylim(0)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of the prompt, film included")
    for row in axes:
        row[0].set_ylabel("times the time of an update")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the headline setting alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--policy", choices=POLICIES, help="default: sketch and scaled; on a GPU qwen3-vl-2b")
    parser.add_argument("--kernel", choices=("sdpa", "flex", "flash"), help="default: the fastest that runs")
    parser.add_argument("--plot", type=Path, help="write a picture of the full comparison's ratios here (.svg, .png)")
    arguments = parser.parse_args()
    if arguments.quick and arguments.plot:
        parser.error("--plot needs the full comparison; leave out --quick")
    cuda = arguments.device == "cuda"
    if not cuda:
        measure.one_thread()
    names = [arguments.policy] if arguments.policy else ["qwen3-vl-2b"] if cuda else ["sketch", "scaled"]
    settings = REAL if names[0].startswith("qwen3") else SMALL
    repeats = 3
    if arguments.quick:
        settings, names, repeats = settings[:1], names[:1], 2
    with contextlib.redirect_stdout(sys.stderr):
        results = {name: run(name, arguments.device, arguments.kernel, settings, repeats) for name in names}
    everything = [setting for own in results.values() for setting in own["settings"]]
    unit = "wall seconds" if cuda else "CPU seconds on one thread"
    if arguments.plot:
        plot(everything, arguments.plot)
    if not arguments.json:
        for name, own in results.items():
            show(name, own, f"{unit}, median")
        return
    headline = {name: everything[0][name] for name in HEADLINE_FIGURES}
    device = torch.cuda.get_device_name() if cuda else _cpu()
    parts = {name: own["parts"] for name, own in results.items()}
    print(json.dumps(headline | {"device": device, "unit": unit, "settings": everything, "parts": parts}))


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
