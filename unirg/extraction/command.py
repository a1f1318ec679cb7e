"""`unirg extract`: what a file of reports says, as JSON lines or as a table."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unirg.scoring.files import ReportFileError, read_reports

from .labels import SCHEMES, label_vector
from .mentions import extract

_STYLES = {"positive": "bold", "uncertain": "yellow", "negative": "dim"}


def run(path: Path, as_json: bool, labels: str | None = None) -> int:
    """Print what each report of `path` (JSONL or CSV, see `read_reports`) mentions; the exit status.

    As JSON, one object a report: {"id", "mentions": [{"finding", "polarity", "side", "place", "severity", "start",
    "end", "text"}]} and, where `labels` names a scheme, "labels": {label: 1, 0, -1 or null}. Without `as_json` a table.
    A file or line that cannot be read, or an unknown scheme, is one line on stderr and status 2.
    """
    if labels is not None and labels not in SCHEMES:
        print(f"unirg extract: --labels {labels!r} is unknown: expected {' or '.join(SCHEMES)}", file=sys.stderr)
        return 2
    try:
        reports = read_reports(path)
    except ReportFileError as error:
        print(f"unirg extract: {error}", file=sys.stderr)
        return 2
    if as_json:
        for name, report in reports.items():
            record: dict[str, object] = {"id": name, "mentions": [asdict(mention) for mention in extract(report)]}
            if labels is not None:
                record["labels"] = label_vector(report, labels)
            print(json.dumps(record, ensure_ascii=False))
        return 0
    Console().print(_table(reports, labels))
    return 0


def _table(reports: dict[str, str], labels: str | None) -> Table:
    table = Table(*(("finding", "polarity", "said of it", "span", "text") if labels is None else ("label", "value")))
    for name, report in reports.items():
        table.add_row(Text(name, style="bold underline"))
        if labels is None:
            for mention in extract(report):
                size = f"{mention.size_mm:g} mm" if mention.size_mm is not None else None
                said = [each for each in (size, mention.severity, mention.side, mention.place) if each is not None]
                cells = (mention.finding, mention.polarity, ", ".join(said))
                span = (f"{mention.start}-{mention.end}", Text(mention.text))
                table.add_row(*cells, *span, style=_STYLES[mention.polarity])
        else:
            for label, value in label_vector(report, labels).items():
                if value is not None:
                    table.add_row(label, str(value))
        table.add_section()
    return table
