"""A fixed corpus of reports, for the document frequencies of BERTScore and CIDEr.

Frequencies taken from the reports of one call would make a score depend on what else is scored with it: with a single
reference every word has the weight log(1) = 0.
"""

import hashlib
import json
from pathlib import Path

from unirg.scoring.contract import RewardError


def read_corpus(path: str) -> tuple[list[str], str]:
    """The reports of a JSONL file, one object with a `report` per line, blank ones left out; and the start of the
    file's SHA-256. Raises RewardError naming file, line and key."""
    try:
        content = Path(path).expanduser().read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"corpus {path} cannot be read ({error}); expected a JSONL file of reports") from error
    reports = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RewardError(f"corpus {path}:{number}: is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("report"), str):
            raise RewardError(f"corpus {path}:{number}: expected an object with a text under 'report'")
        if row["report"].strip():
            reports.append(row["report"])
    if len(reports) < 2:
        raise RewardError(f"corpus {path}: holds {len(reports)} reports; document frequencies need two or more")
    return reports, hashlib.sha256(content).hexdigest()[:16]
