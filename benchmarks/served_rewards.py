"""What it costs to ask a scoring server, beside a worker process of one's own.

    python benchmarks/served_rewards.py [--json]

A batch of 64 studies x 8 candidates of 60 words, with every column that training gives, is submitted and collected
again and again, in calls of 512 and of 32 candidates, for a reward that does nothing: what is left is the way there and
back. The server runs on this machine, so a network's own time comes on top. Milliseconds a batch, wall time, the least
of 60 rounds, which the neighbours on a shared machine disturb least; and the median.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unirg.scoring.contract import RewardConfig, ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.wire import pack
from unirg.study import Study

STUDIES, CANDIDATES, WORDS, ROUNDS = 64, 8, 60, 60
NOTHING = "def nothing(candidates, references, **columns):\n    return [0.5] * len(candidates)\n"
VOCABULARY = ("small", "left", "right", "pleural", "effusion", "consolidation", "of", "the", "lung", "base", "no", "is")


def report(draw: random.Random) -> str:
    """60 words."""
    return " ".join(draw.choices(VOCABULARY, k=WORDS))


def batch() -> ScoreBatch:
    """64 x 8 distinct candidates with their studies' columns."""
    draw = random.Random(0)
    studies = [Study(id=f"study-{i}", findings=report(draw), indication="Cough.") for i in range(STUDIES)]
    rows = [study for study in studies for _ in range(CANDIDATES)]
    columns = study_columns(rows) | {"truncated": [False] * len(rows)}
    return ScoreBatch([report(draw) for _ in rows], [study.findings or "" for study in rows], columns)


def milliseconds(config: RewardConfig, asked: ScoreBatch) -> list[float]:
    """Of each round, the first two left out."""
    found = []
    with ScoringEngine([config], supervised=True) as engine:
        for _ in range(ROUNDS + 2):
            started = time.perf_counter()
            engine.collect(engine.submit(asked))
            found.append(1000 * (time.perf_counter() - started))
    return found[2:]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    arguments = parser.parse_args()
    asked, rows = batch(), []
    with tempfile.TemporaryDirectory() as folder:
        name = f"{folder}/nothing.py:nothing"
        (Path(folder) / "nothing.py").write_text(NOTHING)
        command = [sys.executable, "-m", "unirg", "rewards", "serve", "--rewards", name, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().partition("ready at ")[2].partition(": ")[0]
            places = {"this process": {"worker": False}, "a worker": {}, "a server": {"server": url}}
            for size in (STUDIES * CANDIDATES, 32):
                for place, where in places.items():
                    found = milliseconds(RewardConfig.model_validate({"name": name, "batch_size": size} | where), asked)
                    rows.append({"calls of": size, "scored in": place, "least": min(found)})
                    rows[-1]["median"] = statistics.median(found)
            server.terminate()
    sent = pack({"candidates": asked.candidates, "references": asked.references, "columns": asked.columns})
    if arguments.json:
        print(json.dumps({"rows": rows, "bytes": len(sent)}))
        return
    print(f"{len(asked.candidates)} candidates, {len(sent) / 1e6:.2f} MB a batch\n")
    print("| calls of | scored in | least, ms | median, ms |\n|---:|---|---:|---:|")
    for row in rows:
        print(f"| {row['calls of']} | {row['scored in']} | {row['least']:.1f} | {row['median']:.1f} |")


if __name__ == "__main__":
    main()
