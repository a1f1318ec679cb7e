"""An audit as a table, as sentences and as a picture."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unirg.errors import UserError
from unirg.scoring.audit import BASES, TOLERANCE, Audit, Outcome, Subject
from unirg.scoring.probes import PROBES

WIDTH = 120
MARKS = {"wins": "!", "hardly": "~", "moves": "*"}
STYLES = {"wins": "bold red", "hardly": "yellow", "moves": "yellow", "keeps": "green", "none": "dim"}
WHERE = {"own": "on the study's own report", "draft": "on a half-right draft"}
LEGEND = (
    "Mean of changed less unchanged, on the own report / on a half-right draft. "
    "! a harmful change wins; ~ it loses little or nothing; * a harmless one does not keep its score. "
    f"Little: within {TOLERANCE:.0%} of what another study's report costs."
)


def print_audit(audit: Audit) -> None:
    """Prints the table, then in words what stands out of each reward. A pipe gets 120 columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print()
    console.print(Text(f"{audit.name}: {audit.studies} reports, changed", style="bold"))
    console.print(_table(audit))
    console.print(Text(LEGEND, style="dim"))
    if audit.how:
        console.print(Text(f"Weighted sum: {audit.how}.", style="dim"))
    for subject in audit.subjects:
        for line in in_words(subject):
            console.print(Text(line), soft_wrap=True)


def in_words(subject: Subject) -> list[str]:
    """What a policy would learn: the tricks that pay, those that cost little, and what harmless habits cost."""
    lines = []
    ranked = subject.ranked()
    if subject.wins:
        base, name = ranked[0]
        best = subject.outcomes[base][name]
        lines.append(
            f"{subject.label}: FAILS, a harmful change wins. Pays best: {name} {WHERE[base]}, {_signed(best)} on "
            f"average, a gain in {best.pays:.0%} of {best.judged} reports."
        )
    elif ranked:
        base, name = ranked[0]
        paid = _signed(subject.outcomes[base][name])
        lines.append(f"{subject.label}: no harmful change wins. Costs least: {name} {WHERE[base]} ({paid}).")
    else:
        lines.append(f"{subject.label}: could judge none of the reports.")
    for verdict, said in (("wins", "pays for"), ("hardly", "hardly minds"), ("moves", "minds, though harmless")):
        if found := _listed(subject, verdict):
            lines.append(f"    {said}: {found}")
    return lines


def draw_audits(audits: Sequence[Audit], path: Path) -> None:
    """Writes the picture: probes as rows, rewards as columns, coloured by the mean difference in units of what another
    study's report costs (blue loses, red gains). Raises UserError where the file cannot be written."""
    figure = Figure(figsize=(3.2 + 1.15 * sum(len(a.subjects) for a in audits), 7.4), layout="constrained")
    widths = [len(audit.subjects) for audit in audits]
    panels = figure.subplots(1, len(audits), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, audit in zip(panels, audits, strict=True):
        columns = [(subject, base) for subject in audit.subjects for base in BASES]
        outcomes = [[subject.outcomes[base][probe.name] for subject, base in columns] for probe in PROBES]
        values_PC = np.array(
            [
                [
                    np.nan if o.difference is None else o.difference / (s.yardstick or 1)
                    for o, (s, _) in zip(row, columns)
                ]
                for row in outcomes
            ]
        )
        picture = axes.imshow(values_PC, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for row, of_probe in enumerate(outcomes):
            for column, outcome in enumerate(of_probe):
                if outcome.difference is not None:
                    pale = abs(values_PC[row, column]) < 0.6
                    text = f"{values_PC[row, column]:+.2f}{MARKS.get(outcome.verdict, '')}"
                    axes.text(
                        column, row, text, ha="center", va="center", fontsize=6, color="black" if pale else "white"
                    )
        names = [f"{subject.label}\n{base}".replace("$", r"\$") for subject, base in columns]
        axes.set_xticks(range(len(columns)), names, fontsize=7, rotation=90)
        axes.set_yticks(
            range(len(PROBES)), [f"{'' if p.harmful else 'harmless: '}{p.name}" for p in PROBES], fontsize=8
        )
        axes.set_title(audit.name.replace("$", r"\$"), fontsize=9)
        axes.axhline(sum(probe.harmful for probe in PROBES) - 0.5, color="black", linewidth=1)
    figure.colorbar(picture, ax=list(panels), label="gain, in units of what another study's report costs", shrink=0.6)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
        raise UserError(f"{path}: the picture cannot be written ({error})") from error


def _table(audit: Audit) -> Table:
    table = Table(pad_edge=False)
    table.add_column("change")
    table.add_column("reports", justify="right")
    for subject in audit.subjects:
        table.add_column(Text(subject.label), justify="right")
    first = audit.subjects[0]
    table.add_row("unchanged: scores", "", *(_unchanged(subject) for subject in audit.subjects), style="dim")
    costs = [_short(-subject.yardstick) for subject in audit.subjects]
    table.add_row("another study's", "", *costs, style="dim")
    table.add_section()
    for probe in PROBES:
        if not probe.harmful and PROBES[PROBES.index(probe) - 1].harmful:
            table.add_section()
            table.add_row("harmless:", style="italic")
        of_probe = [first.outcomes[base][probe.name].reports for base in BASES]
        cells = [_cell(subject, probe.name) for subject in audit.subjects]
        table.add_row(probe.name, _counts(of_probe), *cells)
    return table


def _counts(reports: Sequence[int]) -> str:
    return " / ".join(str(count) for count in reports)


def _unchanged(subject: Subject) -> str:
    return " / ".join("–" if (mean := subject.unchanged[base]) is None else _short(mean) for base in BASES)


def _cell(subject: Subject, probe: str) -> Text:
    cell = Text()
    for base in BASES:
        outcome = subject.outcomes[base][probe]
        cell.append(" / " if cell else "")
        cell.append(_signed(outcome) + MARKS.get(outcome.verdict, ""), style=STYLES.get(outcome.verdict, ""))
    return cell


def _listed(subject: Subject, verdict: str) -> str:
    """The probes with this verdict, and on which of the two texts where not on both."""
    names = []
    for probe in PROBES:
        bases = [base for base in BASES if subject.outcomes[base][probe.name].verdict == verdict]
        if bases:
            paid = " / ".join(_signed(subject.outcomes[base][probe.name]) for base in bases)
            names.append(f"{probe.name} ({paid}{'' if len(bases) == 2 else f', {bases[0]}'})")
    return ", ".join(names)


def _signed(outcome: Outcome) -> str:
    return "–" if outcome.difference is None else _short(outcome.difference, "+")


def _short(value: float, sign: str = "-") -> str:
    """`-.312`, `+.003`, `12.500`: no zero before the point."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")
