"""An evaluation as tables on a screen: figures with intervals, arms as columns, controls beside them."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from unirg.evaluation.arms import OUTPUTS

DRAWN_FILMS = "The films are drawn (phantoms), not real radiographs."
INTERVALS = "95% intervals: bootstrap over studies."
TITLES = {
    "positive": "positive findings F1",
    "core": "findings with side F1",
    "negation": "negations F1",
    "truth": "label F1",
    "truth_core": "label and side F1",
    "length": "length, words",
    "duplicates": "duplicate reports",
    "normal": "all-normal reports",
    "truncated": "cut at the limit",
}
WIDTH = 120
EDGE = 2
"""Columns of indentation under a table's title."""


def print_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Print what RUN/evaluation/<split>.json holds. Made for 120 columns and up to five arms; a file or a pipe, which
    has no width of its own, gets them."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(render_evaluation(evaluation))


def render_evaluation(evaluation: Mapping[str, Any]) -> Group:
    """The tables of an evaluation: arms, figures, paired differences, controls, findings."""
    heading = Text(f"{evaluation['split']}: {evaluation['studies']} studies. {INTERVALS}", style="bold")
    parts: list[RenderableType] = [Text(), heading]
    if evaluation.get("film") == "drawn":
        parts.append(Text(DRAWN_FILMS, style="bold yellow"))
    parts += [Text(), _arms(evaluation), Text(), _figures(evaluation)]
    if evaluation.get("versus"):
        parts += [Text(), _paired(evaluation)]
    parts += [Text(), _looking(evaluation), Text(), _per_finding(evaluation)]
    constant = evaluation["controls"].get("best constant report")
    if constant:
        parts += [
            Text(),
            Text("best constant report, of the figure in bold (other figures have their own): "),
            Padding(Text(constant["report"], style="dim"), (0, EDGE)),
        ]
    return Group(*parts)


def render_comparison(differences: Mapping[str, Any], a: str, b: str, studies: int) -> Group:
    """The paired comparison of two prediction files: b less a on the same studies."""
    table = _table(f"{b} minus {a}, paired over {studies} studies. {INTERVALS}", ["difference", "relative"])
    group = ""
    for key, found in sorted(differences.items(), key=lambda item: against(item[0])):
        if against(key) != group:
            group = against(key)
            table.add_row(Text(group, style="italic"))
        table.add_row(f"  {title(key)}", _difference(found, inline=True), percent(found["relative"]))
    return Group(Text(), table)


def title(key: str) -> str:
    """A figure's key in words, without what it is taken against."""
    name = key.partition("/")[0]
    for ending in ("_f1", "_precision", "_recall"):
        stem = name.removesuffix(ending)
        if stem != name and stem in TITLES:
            return TITLES[stem] if ending == "_f1" else TITLES[stem].replace("F1", ending[1:])
    return TITLES.get(name, name)


def against(key: str) -> str:
    """What a figure is taken against, in words."""
    if key in OUTPUTS:
        return "outputs"
    if key.startswith("truth_"):
        return "against the studies' labels"
    return "against complete references" if key.endswith("/complete") else "against the studies' own reports"


def decimals(value: float | None, places: int = 3) -> str:
    """`.843`, `1.000`, `-.012`, `17.3`; a dash where undefined."""
    if value is None:
        return "–"
    if abs(value) >= 10:
        return f"{value:.1f}"
    text = f"{value:.{places}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def percent(value: float | None) -> str:
    """`+10.4%`; a dash where undefined."""
    return "–" if value is None else f"{value:+.1%}"


def duration(seconds: float | None) -> str:
    """`150 s`, `12 min`, `1.5 h`; "not trained" where None."""
    if seconds is None:
        return "not measured"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def trained(arm: Mapping[str, Any]) -> str:
    """An arm's training time; processor time where known: wall time on a shared machine measures the neighbours."""
    if arm.get("cpu_seconds"):
        return duration(arm["cpu_seconds"]) + " of CPU"
    return duration(arm.get("seconds"))


def figure_groups(evaluation: Mapping[str, Any]) -> dict[str, list[str]]:
    """The F1s, metrics and output figures that any arm has, grouped by what they are taken against.

    Precision and recall are not listed: they are shown beside their F1. A metric that is the same against either
    reference (because it reads the labels, or a column of its own) has its own group.
    """
    keys = dict.fromkeys(key for arm in evaluation["arms"].values() for key in arm["metrics"])
    groups: dict[str, list[str]] = {
        "against the studies' labels": [],
        "against complete references": [],
        "against the studies' own reports": [],
        "metrics with a reference of their own": [],
        "outputs": [],
    }
    two_references = any(key.endswith("/complete") for key in keys)
    for key in keys:
        if precision_and_recall(key):
            continue
        group = against(key)
        if two_references and group == "against the studies' own reports" and f"{key}/complete" not in keys:
            group = "metrics with a reference of their own"
        groups[group].append(key)
    return {name: found for name, found in groups.items() if found}


def precision_and_recall(key: str) -> bool:
    """Whether the key is of a counted precision or recall."""
    name = key.partition("/")[0]
    return name.endswith(("_precision", "_recall")) and name.rpartition("_")[0] in TITLES


def looked_at(evaluation: Mapping[str, Any]) -> list[str]:
    """The figures worth showing sampled and shuffled: the headline, findings, negations and labels, against complete
    references where there are some. The JSON has the others."""
    known = {key for arm in evaluation["arms"].values() for key in arm["metrics"]}
    counted = [f"{name}/complete" if f"{name}/complete" in known else name for name in ("positive_f1", "negation_f1")]
    return list(dict.fromkeys(key for key in (evaluation["headline"], *counted, "truth_f1") if key in known))


def _arms(evaluation: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm", no_wrap=True)
    table.add_column("trained for", justify="right", no_wrap=True)
    table.add_column("what it was allowed to see")
    for name, arm in evaluation["arms"].items():
        table.add_row(Text(name, style="bold"), trained(arm), Text(arm.get("sees") or "–"))
    return table


def _figures(evaluation: Mapping[str, Any]) -> Table:
    columns = evaluation["arms"] | evaluation["controls"]
    table = _table(None, [name.removesuffix(" report") for name in columns])
    for group, keys in figure_groups(evaluation).items():
        table.add_section()
        table.add_row(Text(group, style="italic"))
        for key in keys:
            marked = Text(f"  {title(key)}", style="bold" if key == evaluation["headline"] else "")
            table.add_row(marked, *(_cell(column["metrics"].get(key)) for column in columns.values()))
            stem, slash, ending = key.partition("/")
            beside = [f"{stem.removesuffix('_f1')}_{what}{slash}{ending}" for what in ("precision", "recall")]
            if all(any(name in arm["metrics"] for arm in evaluation["arms"].values()) for name in beside):
                pairs = [[column["metrics"].get(name) for name in beside] for column in columns.values()]
                table.add_row(Text("    precision / recall", style="dim"), *(_pair(*pair) for pair in pairs))
    return table


def _paired(evaluation: Mapping[str, Any]) -> Table:
    versus, baseline = evaluation["versus"], evaluation["baseline"]
    table = _table(f"difference from {baseline}, paired: its 95% interval, and the relative gain", versus)
    for group, keys in figure_groups(evaluation).items():
        table.add_section()
        table.add_row(Text(group, style="italic"))
        for key in keys:
            cells = [_difference(arm.get(key)) for arm in versus.values()]
            table.add_row(Text(f"  {title(key)}", style="bold" if key == evaluation["headline"] else ""), *cells)
    return table


def _looking(evaluation: Mapping[str, Any]) -> Table:
    arms = evaluation["arms"]
    sampled = any("sampled" in arm for arm in arms.values())
    ways = "greedy, sampled at temperature 1, and" if sampled else "greedy, and"
    table = _table(f"{ways} greedy with the films shuffled among the studies", arms)
    for key in looked_at(evaluation):
        greedy = [arm["metrics"].get(key) for arm in arms.values()]
        table.add_row(Text(f"{title(key)}, {against(key).removeprefix('against ')}"))
        table.add_row("  greedy", *(_mean(found) for found in greedy))
        if sampled:
            table.add_row("  sampled", *(_mean(arm.get("sampled", {}).get(key)) for arm in arms.values()))
        table.add_row("  films shuffled", *(_mean(arm["shuffled"].get(key)) for arm in arms.values()))
    return table


def _per_finding(evaluation: Mapping[str, Any]) -> Table:
    arms = evaluation["arms"]
    columns = arms | {name: c for name, c in evaluation["controls"].items() if name == "perfect reporter"}
    table = _table("F1 by finding", ["present", *columns])
    findings = dict.fromkeys(finding for arm in arms.values() for finding in arm["per_finding"])
    for finding in findings:
        found = [column["per_finding"].get(finding) for column in columns.values()]
        present = max((entry["present"] for entry in found if entry), default=0)
        table.add_row(finding.replace("_", " "), str(present), *(_mean(entry and entry["f1"]) for entry in found))
    return table


def _table(heading: str | None, columns: Iterable[str]) -> Table:
    table = Table(title=heading, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.box, table.show_lines = None, False
    table.add_column("", max_width=28)  # leaves 120 columns room for the intervals of five arms and two controls
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _cell(found: Mapping[str, Any] | None) -> Text:
    if not found:
        return Text("–")
    cell = Text(decimals(found["mean"]))
    if found["low"] is not None:
        cell.append(f"\n{decimals(found['low'])}–{decimals(found['high'])}", style="dim")
    return cell


def _mean(found: Mapping[str, Any] | None) -> Text:
    return Text(decimals(found["mean"]) if found else "–")


def _pair(precision: Mapping[str, Any] | None, recall: Mapping[str, Any] | None) -> Text:
    both = (decimals(found["mean"], 2) if found else "–" for found in (precision, recall))
    return Text(" / ".join(both), style="dim")


def _difference(found: Mapping[str, Any] | None, *, inline: bool = False) -> Text:
    """The difference, its relative gain and its interval; bold where the interval leaves out 0."""
    if not found or found["difference"] is None:
        return Text("–")
    sign = "+" if found["difference"] > 0 else ""
    clear = found["low"] is not None and (found["low"] > 0 or found["high"] < 0)
    text = Text(f"{sign}{decimals(found['difference'])}", style="bold" if clear else "")
    interval = f"[{decimals(found['low'])}, {decimals(found['high'])}]"
    if not inline and found["relative"] is not None:
        text.append(f" {percent(found['relative'])}", style="dim")
    text.append(f" {interval}" if inline else f"\n{interval}", style="dim")
    return text
