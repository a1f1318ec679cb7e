"""Independent chains of one experiment side by side: `python benchmarks/chains.py runs/demo-0 runs/demo-1 runs/demo-2`.

Reads RUN/evaluation/<split>.json of finished runs and prints Markdown: per chain and split every arm's figures with 95%
intervals, and the paired difference to the baseline. `make demo-seeds` ends with it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FIGURES = {
    "truth_f1": "label F1, against what was drawn",
    "positive_f1/complete": "positive findings F1, complete references",
    "entity_f1/complete": "entity F1, complete references",
    "negation_f1/complete": "negations F1, complete references",
    "ratescore/complete": "RaTEScore, complete references (not optimised)",
    "positive_f1": "positive findings F1, the omitting references",
    "length": "words",
    "duplicates": "duplicate reports",
    "normal": "all-normal reports",
}


def figure(found: dict[str, Any] | None, ends: tuple[str, str] = ("low", "high"), centre: str = "mean") -> str:
    """`.905 [.893, .917]`, or a dash."""
    if found is None or found[centre] is None:
        return "–"
    low, high = (f"{found[end]:.3f}" for end in ends)
    return f"{found[centre]:.3f} [{low}, {high}]"


def row(name: str, cells: list[str], columns: int) -> str:
    """A row of a Markdown table; columns that have no such figure get a dash."""
    return f"| {name} | " + " | ".join(cells + ["–"] * (columns - len(cells))) + " |"


def arms_table(evaluation: dict[str, Any]) -> list[str]:
    """One row per figure, one column per arm, then the perfect reporter and the best constant report."""
    columns = {name: arm["metrics"] for name, arm in evaluation["arms"].items()}
    columns |= {name: control["metrics"] for name, control in evaluation["controls"].items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    seconds = [arm.get("cpu_seconds") for arm in evaluation["arms"].values()]
    lines.append(row("training, CPU-s", ["–" if s is None else f"{s:.0f}" for s in seconds], len(columns)))
    for key, name in FIGURES.items():
        if any(key in metrics for metrics in columns.values()):
            lines.append(row(name, [figure(metrics.get(key)) for metrics in columns.values()], len(columns)))
    shuffled = [figure(arm["shuffled"].get("truth_f1")) for arm in evaluation["arms"].values()]
    lines.append(row("label F1, films shuffled", shuffled, len(columns)))
    sampled = [figure((arm.get("sampled") or {}).get("truth_f1")) for arm in evaluation["arms"].values()]
    lines.append(row("label F1, sampled at temperature 1", sampled, len(columns)))
    return lines


def paired_rows(chain: str, evaluation: dict[str, Any], arm: str) -> list[str]:
    """The arm less the baseline, paired over studies."""
    rows = []
    for key, name in FIGURES.items():
        found = evaluation["versus"].get(arm, {}).get(key)
        if found is not None:
            relative = "–" if found["relative"] is None else f"{found['relative']:+.1%}"
            rows.append(
                f"| {chain} | {evaluation['split']} | {name} | {figure(found, centre='difference')} | {relative} |"
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", default="test,unseen")
    parser.add_argument("--arm", default="grpo_labels", help="the arm that is compared with the baseline, pair by pair")
    arguments = parser.parse_args()
    chains = {}
    for run in arguments.runs:
        for split in arguments.splits.split(","):
            path = run / "evaluation" / f"{split}.json"
            if not path.exists():
                print(f"{path}: missing; run `unirg evaluate {run}`", file=sys.stderr)
                return 2
            chains[run.name, split] = json.loads(path.read_text(encoding="utf-8"))
    print("Films are drawn (phantoms), not real radiographs. 95% intervals: bootstrap over studies.\n")
    for (chain, split), evaluation in chains.items():
        print(f"### {chain}, {split}: {evaluation['studies']} studies\n")
        print("\n".join(arms_table(evaluation)) + "\n")
    baseline = next(iter(chains.values()))["baseline"]
    print(f"### {arguments.arm} less {baseline}, paired over studies\n")
    print("| chain | split | figure | difference | relative |\n|---|---|---|---|---|")
    for (chain, _), evaluation in chains.items():
        print("\n".join(paired_rows(chain, evaluation, arguments.arm)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
