"""Rewards that hold a model, beside the official packages: CPU seconds of scoring one GRPO-shaped batch.

    make test-parity                     # makes the official package's environment, .venv-radgraph
    python benchmarks/rewards.py         # --quick: two studies; --json: one JSON object

RadGraph: radgraph 0.1.18 in its own environment, as a subprocess, and `radgraph_f1` here read one archive of BERT-base
size with random weights and score the same batch of studies x 8 candidates, on one thread. Its scorers' biases are such
that reports have about as many entities and relations as RadGraph-XL finds in real ones. Loading is not counted. A
quarter of the candidates repeat another of their study, as in rollouts; repeats are scored like any other candidate by
the package, which also annotates each study's reference 8 times.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the archives' builder is the tests'

from tests.radgraph_archives import write_archive  # noqa: E402
from unirg_rewards import radgraph_model  # noqa: E402
from unirg_rewards.radgraph_f1 import LEVELS, RadGraphF1, bfloat16_disagreement  # noqa: E402

MODEL = "radgraph-xl"
CANDIDATES = 8
REPEATED = 2  # of a study's candidates
BERT_BASE = {"hidden": 768, "layers": 12, "heads": 12, "max_length": 512, "scorer_width": 150, "layer_scale": 0.5}
BIASES = {"ner_bias": -1.65, "relation_bias": 1.25}
PLACES = ("left", "right", "bilateral", "left lower lobe", "right lower lobe")
FINDINGS = ("pleural effusion", "atelectasis", "opacity", "consolidation", "edema", "pneumothorax")
SENTENCES = (
    "The heart is normal in size.",
    "There is mild cardiomegaly, unchanged.",
    "Lungs are clear.",
    "No pneumothorax.",
    "No focal consolidation, pleural effusion or pneumothorax.",
    "Tube ends above the carina.",
    "No acute cardiopulmonary process.",
)


def a_report(rng: random.Random) -> str:
    """Six sentences of a report, about 40 words and marks, invented."""
    said = rng.sample(SENTENCES, 3)
    for _ in range(3):
        grade, place = rng.choice(("small", "mild", "severe", "acute")), rng.choice(PLACES)
        said.append(f"There is {grade} {place} {rng.choice(FINDINGS)} with adjacent {rng.choice(FINDINGS)}.")
    rng.shuffle(said)
    return " ".join(said)


def a_batch(studies: int) -> tuple[list[str], list[str]]:
    """Candidates and their references, study by study."""
    rng = random.Random(0)
    candidates, references = [], []
    for _ in range(studies):
        different = [a_report(rng) for _ in range(CANDIDATES - REPEATED)]
        candidates += [*different, *rng.choices(different, k=REPEATED)]
        references += [a_report(rng)] * CANDIDATES
    return candidates, references


def an_archive(folder: Path) -> Path:
    """BERT-base size. The pruner is given the entity scorer's weights: in a trained model it prefers entities too."""
    path = write_archive(folder, MODEL, **BERT_BASE, **BIASES) / MODEL / "weights.th"
    weights = torch.load(path, weights_only=True)
    pruner = f"_relation._mention_pruners.{MODEL}__relation_labels._scorer"
    for key in [key for key in weights if key.startswith(pruner)]:
        entity = weights[key.replace(pruner, f"_ner._ner_scorers.{MODEL}__ner_labels")]
        weights[key] = entity.mean(dim=0, keepdim=True) if "1._module" in key else entity.clone()
    torch.save(weights, path)
    return folder


def official(python: Path, folder: Path, candidates: list[str], references: list[str]) -> dict[str, Any]:
    """What `tests/parity_official/official_radgraph.py` answers. Raises SystemExit where the package cannot be run."""
    request = {"folder": str(folder), "model": MODEL, "candidates": candidates, "references": references}
    command = [str(python), str(ROOT / "tests" / "parity_official" / "official_radgraph.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    except OSError as error:
        raise SystemExit(
            f"{python} cannot be run ({error}); make test-parity makes it, --official names another"
        ) from None
    if done.returncode:
        raise SystemExit(f"radgraph failed under {python}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def ours(folder: Path, precision: str, candidates: list[str], references: list[str]) -> tuple[float, list[list[float]]]:
    """CPU seconds of the first scoring after loading, and the scores of every level but `combined`."""
    radgraph_model.load_radgraph.cache_clear()
    rewards = [RadGraphF1(level, MODEL, str(folder), "pypi", precision=precision) for level in LEVELS[:3]]
    for reward in rewards:
        reward.setup()
    started = time.process_time()
    values = [reward.values(candidates, references) for reward in rewards]
    return time.process_time() - started, values


def compare(studies: int, folder: Path, python: Path) -> dict[str, Any]:
    """One setting, scored by the package and by ours."""
    candidates, references = a_batch(studies)
    seconds, values = ours(folder, "float32", candidates, references)
    texts = list(dict.fromkeys([*candidates, *references]))
    annotations = RadGraphF1(model=MODEL, model_folder=str(folder)).annotate(texts)
    entities = [entity for annotation in annotations for entity in annotation.values()]
    answer = official(python, folder, candidates, references)
    rounded, _ = ours(folder, "bfloat16", candidates, references)
    pairs = [pair for level in zip(values, answer["rewards"]) for pair in zip(*level)]
    return {
        "studies": studies,
        "reports": 2 * len(candidates),
        "distinct": len(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "entities": len(entities) / len(texts),
        "relations": sum(len(entity["relations"]) for entity in entities) / len(texts),
        "seconds": {"official": answer["cpu_seconds"], "float32": seconds, "bfloat16": rounded},
        "largest_difference": max(abs(one - other) for one, other in pairs),
        "bfloat16_disagreement": bfloat16_disagreement(texts[:64], MODEL, str(folder)),
        "versions": answer["versions"] | {"here": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two studies")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    default = ROOT / ".venv-radgraph" / "bin" / "python"
    parser.add_argument("--official", type=Path, default=default, help="a Python that has radgraph 0.1.18")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="unirg-benchmark-") as folder:
        archive = an_archive(Path(folder))
        results = [compare(studies, archive, options.official) for studies in ((2,) if options.quick else (8, 64))]
    if options.json:
        print(json.dumps({"unit": "CPU seconds", "threads": 1, "results": results}))
        return
    table = Table("studies", title="RadGraph F1, CPU seconds on one thread")
    for column in ("reports", "distinct", "radgraph", "float32", "ratio", "bfloat16", "ratio"):
        table.add_column(column, justify="right")
    for result in results:
        seconds = result["seconds"]
        cells = [str(result["reports"]), str(result["distinct"]), f"{seconds['official']:.2f}"]
        for precision in ("float32", "bfloat16"):
            cells += [f"{seconds[precision]:.2f}", f"{seconds['official'] / seconds[precision]:.1f}"]
        table.add_row(f"{result['studies']} x {CANDIDATES}", *cells)
    console = Console()
    console.print(table)
    for result in results:
        console.print(
            f"{result['studies']} studies: {result['words']:.0f} words, {result['entities']:.1f} entities and "
            f"{result['relations']:.1f} relations a report; largest difference of a score in float32 "
            f"{result['largest_difference']:.1e}; bfloat16 against float32: {result['bfloat16_disagreement']}"
        )


if __name__ == "__main__":
    main()
