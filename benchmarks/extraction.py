"""How well the report reader agrees with people, and how fast it is.

    UNIRG_REFERENCE=... UNIRG_OPENI=... python benchmarks/extraction.py

Gold: 14 labels on Open-i reports by NegBio's annotators (Peng et al. 2018), `openi_gold/openi_gold_dev.csv` of the
reference data. Reports: see `unirg data fetch openi`. Reports are halved by a hash of their id; the extractor's phrases
and the choice of what counts as present were made on the tuning half alone, so the other half is the one to quote.
A label counts as predicted where the report affirms it (`label_vector` = 1); `--uncertain` counts doubted ones too.
Beside it a baseline: one keyword pattern a label, denied where "no", "without" or the like stands before it in the
sentence. `Hernia` is empty in the gold although reports name hiatal hernias, so a second micro average leaves it out.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unirg.data.openi import find_reports, read_reports
from unirg.extraction import extract, label_vector

KEYWORDS = {
    "Atelectasis": r"atelecta",
    "Cardiomegaly": r"cardiomegaly|enlarged (?:heart|cardiac)|(?:heart|cardiac)[a-z ]{0,25} enlarge",
    "Effusion": r"effusion",
    "Infiltration": r"infiltrat",
    "Mass": r"\bmass",
    "Nodule": r"nodul",
    "Pneumonia": r"pneumonia",
    "Pneumothorax": r"pneumothora",
    "Consolidation": r"consolidat",
    "Edema": r"edema",
    "Emphysema": r"emphysem",
    "Fibrosis": r"fibro(?:sis|tic)",
    "Pleural_Thickening": r"pleural thickening|thickened pleura",
    "Hernia": r"hernia",
}
DENIED = re.compile(r"\b(?:no|not|without|free of|clear of|negative for|absence of|resolved)\b")
Counts = list[int]  # true positives, false positives, false negatives
Predict = Callable[[str], Mapping[str, bool]]


def baseline(report: str) -> dict[str, bool]:
    """Label -> whether a sentence names it with no denial before it."""
    found = dict.fromkeys(KEYWORDS, False)
    for sentence in re.split(r"[.;]\s", report.lower()):
        for label, pattern in KEYWORDS.items():
            match = re.search(pattern, sentence)
            if match and not DENIED.search(sentence[: match.end()]):
                found[label] = True
    return found


def is_tuning(name: str) -> bool:
    """Whether the report of this id belongs to the half that the extractor was tuned on."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def load(gold: Path, openi: Path | None) -> list[tuple[str, str, dict[str, bool]]]:
    """(id, report, label -> present) for every report of the gold file."""
    texts = {
        f"CXR{report.number}": f"Findings: {report.findings} Impression: {report.impression}"
        for report in read_reports(find_reports(openi))
    }
    with gold.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [(row["filename"], texts[row["filename"]], {label: row[label] == "1" for label in KEYWORDS}) for row in rows]


def count(rows: Iterable[tuple[str, str, dict[str, bool]]], predict: Predict) -> dict[str, Counts]:
    """Label -> counts over the rows."""
    counts: dict[str, Counts] = {label: [0, 0, 0] for label in KEYWORDS}
    for _, report, truth in rows:
        predicted = predict(report)
        for label, present in truth.items():
            if predicted[label] or present:
                counts[label][0 if predicted[label] and present else 1 if predicted[label] else 2] += 1
    return counts


def rates(counts: Counts) -> dict[str, float]:
    """Precision, recall and F1; 0 where nothing was predicted or present."""
    hits, false, missed = counts
    return {
        "precision": hits / max(1, hits + false),
        "recall": hits / max(1, hits + missed),
        "f1": 2 * hits / max(1, 2 * hits + false + missed),
    }


def scores(counts: dict[str, Counts]) -> dict[str, dict[str, float]]:
    """Rates of every label and of the two micro averages."""
    rows = {label: rates(each) | {"positives": each[0] + each[2]} for label, each in counts.items()}
    for name, left_out in (("micro", ""), ("micro without Hernia", "Hernia")):
        totals = [sum(each[k] for label, each in counts.items() if label != left_out) for k in range(3)]
        rows[name] = rates(totals) | {"positives": totals[0] + totals[2]}
    return rows


def milliseconds(reports: list[str]) -> float:
    """Mean time to extract one report, nothing cached."""
    from unirg.extraction.mentions import _read

    extract.cache_clear()
    _read.cache_clear()
    start = time.process_time()
    for report in reports:
        extract(report)
    return (time.process_time() - start) / len(reports) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("UNIRG_REFERENCE")
    gold = Path(folder) / "openi_gold" / "openi_gold_dev.csv" if folder else None
    parser.add_argument("--gold", type=Path, default=gold, help="the gold labels (default: in $UNIRG_REFERENCE)")
    parser.add_argument("--openi", type=Path, help="the torchxrayvision wheel, its .tgz or the XML folder")
    parser.add_argument("--uncertain", action="store_true", help="count doubted findings as present")
    parser.add_argument("--quick", action="store_true", help="every tenth report")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.gold is None:
        parser.error("name the gold labels with --gold, or set UNIRG_REFERENCE")
    rows = load(options.gold, options.openi)[:: 10 if options.quick else 1]
    present = (1, -1) if options.uncertain else (1,)

    def ours(report: str) -> dict[str, bool]:
        return {label: value in present for label, value in label_vector(report, "cxr14").items()}

    halves = {
        "tuning": [row for row in rows if is_tuning(row[0])],
        "held out": [r for r in rows if not is_tuning(r[0])],
    }
    result = {
        half: {name: scores(count(part, predict)) for name, predict in (("unirg", ours), ("baseline", baseline))}
        for half, part in halves.items()
    }
    words = sum(len(row[1].split()) for row in rows) / len(rows)
    speed = {"ms_per_report": milliseconds([row[1] for row in rows]), "words_per_report": words, "reports": len(rows)}
    if options.json:
        print(json.dumps({"halves": result, "speed": speed}, indent=2))
        return
    console = Console()
    for half, systems in result.items():
        table = Table("label", "positives", title=f"{half} half, {len(halves[half])} reports: unirg | baseline")
        for column in ("P", "R", "F1", "P ", "R ", "F1 "):
            table.add_column(column, justify="right")
        for label, row in systems["unirg"].items():
            values = [each[key] for each in (row, systems["baseline"][label]) for key in ("precision", "recall", "f1")]
            table.add_row(label, str(row["positives"]), *(f"{value:.3f}" for value in values))
        console.print(table)
    console.print(f"{speed['ms_per_report']:.3f} ms a report of {words:.0f} words (one core, nothing cached)")


if __name__ == "__main__":
    main()
