"""Rewards that hold a model, beside the official packages and RadEval: CPU seconds of scoring one GRPO-shaped batch.

    make test-parity                     # makes the official packages' environments
    python benchmarks/rewards.py         # --quick: two studies; --json: one JSON object; --metric: one of the two

The packages run in their own environments, as subprocesses, on one thread; loading is not counted. Both sides read one
archive of the published models' size with random weights and score the same batch of studies x 8 candidates:

- `radgraph_f1` (BERT-base) beside radgraph 0.1.18 and the copy in RadEval 2.2.1. The scorers' biases are such that
  reports have about as many entities and relations as RadGraph-XL finds in real ones.
- `ratescore` (DeBERTa-v3-base and MPNet-base) beside RaTEScore 0.6.0 and the copy in RadEval, with the log of their
  sentence splitter switched off; ours uses the same splitter where it is installed, and else its rule. `ours, next
  batch` is another batch of the kind, scored when ours has just scored the first.

The batch repeats itself as real rollouts do. In the 200 GRPO steps of the demo on Open-i's reports (24 studies x 12) on
average 11% of a step's candidates repeated another of their study (1 to 4% in the first steps, 12 to 20% in the last)
and 66% of its sentences another of the step; the invented reports here are drawn to about the same shares. The packages
score repeats like anything else and read each study's reference 8 times. `--rollouts FILE` takes the candidates from a
run's rollout file instead (which keeps no references: the next study's first candidate stands for it).
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the archives' builders are the tests'

from tests.radgraph_archives import write_archive  # noqa: E402
from tests.ratescore_archives import write_embedder, write_tagger  # noqa: E402
from unirg_rewards import radgraph_model, ratescore_official  # noqa: E402
from unirg_rewards.radgraph_f1 import LEVELS, RadGraphF1, bfloat16_disagreement  # noqa: E402
from unirg_rewards.ratescore import RateScore  # noqa: E402

MODEL = "radgraph-xl"
CANDIDATES = 8
REPEATED = 0.11  # of the candidates: a copy of another of their study
COMMON = 0.45  # of the sentences: from SENTENCES, the first of them oftener
BERT_BASE = {"hidden": 768, "layers": 12, "heads": 12, "max_length": 512, "scorer_width": 150, "layer_scale": 0.5}
BIASES = {"ner_bias": -1.65, "relation_bias": 1.25}
BASE = {"hidden": 768, "layers": 12, "heads": 12, "layer_scale": 0.5}
O_BIAS = 3.0
GRADES = ("small", "mild", "severe", "acute", "stable")
PLACES = ("left", "right", "bilateral", "left lower lobe", "right lower lobe")
FINDINGS = ("pleural effusion", "atelectasis", "opacity", "consolidation", "edema", "pneumothorax", "cardiomegaly")
SENTENCES = (
    "The heart is normal in size.",
    "Lungs are clear.",
    "No pneumothorax.",
    "No pleural effusion.",
    "No focal consolidation, pleural effusion or pneumothorax.",
    "No acute cardiopulmonary process.",
    "There is no pneumothorax or pleural effusion.",
    "The lungs are clear with no focal opacity.",
    "Heart size is normal.",
    "There is mild cardiomegaly, unchanged.",
    "Tube ends above the carina.",
    "The heart and lungs are normal.",
)

Batch = tuple[list[str], list[str]]  # candidates and their references, study by study


def a_report(rng: random.Random) -> str:
    """Four to seven sentences, about 35 words and marks, invented."""
    said = []
    for _ in range(rng.randint(4, 7)):
        if rng.random() < COMMON:
            said.append(rng.choices(SENTENCES, [1 / rank for rank in range(1, len(SENTENCES) + 1)])[0])
        else:
            grade, place = rng.choice(GRADES), rng.choice(PLACES)
            one, other = rng.sample(FINDINGS, 2)
            said.append(f"There is {grade} {place} {one} with adjacent {other}.")
    return " ".join(said)


def a_batch(studies: int, seed: int = 0) -> Batch:
    """An invented batch."""
    rng = random.Random(seed)
    candidates = [a_report(rng) for _ in range(studies * CANDIDATES)]
    for copy in rng.sample(range(len(candidates)), round(REPEATED * len(candidates))):
        study, g = divmod(copy, CANDIDATES)
        candidates[copy] = candidates[study * CANDIDATES + (g + 1) % CANDIDATES]
    return candidates, [reference for _ in range(studies) for reference in [a_report(rng)] * CANDIDATES]


def a_rollout_file(file: Path) -> Batch:
    """The reports of a rollout file, each study's beside the first candidate of the next one."""
    import pyarrow.parquet

    studies: dict[str, list[str]] = {}
    for row in pyarrow.parquet.read_table(file, columns=["study_id", "candidate"]).to_pylist():
        if row["candidate"].strip():  # the packages have no answer for a blank one
            studies.setdefault(row["study_id"], []).append(row["candidate"])
    groups = list(studies.values())
    references = [other[0] for group, other in zip(groups, groups[1:] + groups[:1]) for _ in group]
    return [candidate for group in groups for candidate in group], references


def shares(batch: Batch) -> dict[str, float]:
    """How a batch repeats itself: shares of its candidates within their study, and of their sentences within it all."""
    studies: dict[str, list[str]] = {}
    for candidate, reference in zip(*batch):
        studies.setdefault(reference, []).append(candidate)
    sentences = [text for report in batch[0] for text in re.split(r"(?<=[.!?])\s+", report)]
    return {
        "reports": 2 * len(batch[0]),
        "distinct": len({*batch[0], *batch[1]}),
        "words": sum(len(text.split()) for text in batch[0]) / len(batch[0]),
        "candidates_repeated": 1 - sum(len(set(group)) for group in studies.values()) / len(batch[0]),
        "sentences_repeated": 1 - len(set(sentences)) / len(sentences),
    }


def radgraph_archive(folder: Path) -> Path:
    """BERT-base size. The pruner is given the entity scorer's weights: in a trained model it prefers entities too."""
    path = write_archive(folder, MODEL, **BERT_BASE, **BIASES) / MODEL / "weights.th"
    weights = torch.load(path, weights_only=True)
    pruner = f"_relation._mention_pruners.{MODEL}__relation_labels._scorer"
    for key in [key for key in weights if key.startswith(pruner)]:
        entity = weights[key.replace(pruner, f"_ner._ner_scorers.{MODEL}__ner_labels")]
        weights[key] = entity.mean(dim=0, keepdim=True) if "1._module" in key else entity.clone()
    torch.save(weights, path)
    return folder


def ratescore_archives(folder: Path) -> dict[str, str]:
    """Base sizes. The tagger's labels are centred on the invented sentences, and O raised, so that entities occur."""
    ner, embedder = folder / "ner", folder / "embedder"
    names = {"ner": str(ner), "embedder": str(embedder)}
    if not ner.exists():
        write_tagger(ner, **BASE)
        write_embedder(embedder, **BASE)
        encoder = ratescore_official.load_tagger(str(ner), "cpu").encoder
        ids = encoder.tokenizer([*SENTENCES, *a_batch(1)[0]])["input_ids"]
        read = [logits_BTL[:, : len(ids[rows[-1]])].flatten(0, 1) for rows, logits_BTL in encoder.batches(ids)]
        logits_NL = torch.cat(read)  # as many tokens of each as the shortest of its forward has
        weights = load_file(ner / "model.safetensors")
        weights["classifier.bias"] -= logits_NL.mean(dim=0)
        weights["classifier.bias"][0] += O_BIAS
        save_file(weights, ner / "model.safetensors", {"format": "pt"})
    return names


def official(python: Path, script: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a script of tests/parity_official answers. Raises SystemExit where the package cannot be run."""
    command = [str(python), str(ROOT / "tests" / "parity_official" / script)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    except OSError as error:
        raise SystemExit(f"{python} cannot be run ({error}); make test-parity makes it") from None
    if done.returncode:
        raise SystemExit(f"{request['package']} failed under {python}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def timed(score: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what `score` answers."""
    started = time.process_time()
    answer = score()
    return time.process_time() - started, answer


def _all_values(rewards: list[RadGraphF1], batch: Batch) -> list[list[float]]:
    return [reward.values(*batch) for reward in rewards]


def compare_radgraph(batch: Batch, folder: Path, scored: int) -> dict[str, Any]:
    """RadGraph F1 of one batch: the package, RadEval, ours in float32 and in bfloat16."""
    candidates, references = batch
    archive = folder / "radgraph"
    if not archive.exists():
        radgraph_archive(archive)
    seconds, values = {}, {}
    for precision in ("float32", "bfloat16"):
        radgraph_model.load_radgraph.cache_clear()
        rewards = [RadGraphF1(level, MODEL, str(archive), "pypi", precision=precision) for level in LEVELS[:3]]
        for reward in rewards:
            reward.setup()
        seconds[f"ours, {precision}"], values[precision] = timed(partial(_all_values, rewards, batch))
    request = {"folder": str(archive), "model": MODEL}
    request |= {"candidates": candidates[:scored], "references": references[:scored]}
    versions, differences = {"torch": torch.__version__}, []
    for package, environment in (("radgraph", ".venv-radgraph"), ("radeval", ".venv-parity")):
        python = ROOT / environment / "bin" / "python"
        answer = official(python, "official_radgraph.py", request | {"package": package})
        seconds[package] = answer["cpu_seconds"] * len(candidates) / scored
        versions[package] = answer["versions"]
        pairs = [pair for level in zip(values["float32"], answer["rewards"]) for pair in zip(*level)]
        differences.append(max(abs(one - other) for one, other in pairs))
    texts = list(dict.fromkeys([*candidates, *references]))
    annotations = RadGraphF1(model=MODEL, model_folder=str(archive)).annotate(texts)
    entities = [entity for annotation in annotations for entity in annotation.values()]
    return {
        "seconds": seconds,
        "largest_difference": max(differences),
        "entities": len(entities) / len(texts),
        "relations": sum(len(entity["relations"]) for entity in entities) / len(texts),
        "bfloat16_disagreement": bfloat16_disagreement(texts[:64], MODEL, str(archive)),
        "versions": versions,
    }


def compare_ratescore(batch: Batch, folder: Path, scored: int) -> dict[str, Any]:
    """RaTEScore of one batch: the package, RadEval, ours, and ours on another batch of the kind right after it."""
    candidates, references = batch
    names = ratescore_archives(folder)
    ratescore_official.load_tagger.cache_clear()
    ratescore_official.load_strings.cache_clear()
    splitter = "pyrush" if find_spec("PyRuSH") else "rule"
    reward = RateScore("official", official_edges=True, sentences=splitter, **names)
    reward.setup()
    seconds = {}
    seconds["ours"], values = timed(lambda: reward.score(*batch))
    following = a_batch(len(candidates) // CANDIDATES, seed=1)
    seconds["ours, next batch"], _ = timed(lambda: reward.score(*following))
    request = names | {
        "weights": "long",
        "texts": [],
        "candidates": candidates[:scored],
        "references": references[:scored],
    }
    versions, differences = {"torch": torch.__version__}, []
    python = ROOT / ".venv-parity" / "bin" / "python"
    for package in ("RaTEScore", "radeval"):
        answer = official(python, "official_ratescore.py", request | {"package": package})
        seconds[package] = answer["cpu_seconds"] * len(candidates) / scored
        versions[package] = answer["versions"]
        differences += [abs(one - other) for one, other in zip(values[:scored], answer["scores"], strict=True)]
    texts = list(dict.fromkeys([*candidates, *references]))
    entities = reward.models.entities(texts)
    return {
        "seconds": seconds,
        "largest_difference": max(differences),
        "beyond_1e-6": sum(difference > 1e-6 for difference in differences) / len(differences),
        "entities": sum(map(len, entities)) / len(texts),
        "versions": versions,
    }


COMPARED: dict[str, Callable[[Batch, Path, int], dict[str, Any]]] = {
    "radgraph": compare_radgraph,
    "ratescore": compare_ratescore,
}
OFFICIAL = {"radgraph": "radgraph", "ratescore": "RaTEScore"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two studies")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--metric", choices=list(COMPARED), help="one of the two; both where not given")
    parser.add_argument("--rollouts", type=Path, help="score the reports of this rollout file")
    parser.add_argument("--pairs", type=int, help="the packages score so many pairs, their time is scaled; default all")
    parser.add_argument("--studies", type=int, nargs="+", default=[8, 64], help="the batches' sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rollouts:
        batches = {options.rollouts.stem: a_rollout_file(options.rollouts)}
    else:
        batches = {
            f"{studies} x {CANDIDATES}": a_batch(studies) for studies in ([2] if options.quick else options.studies)
        }
    results = []
    with tempfile.TemporaryDirectory(prefix="unirg-benchmark-") as folder:
        for metric in [options.metric] if options.metric else list(COMPARED):
            for name, batch in batches.items():
                scored = min(len(batch[0]), options.pairs or len(batch[0]))
                found = COMPARED[metric](batch, Path(folder), scored)
                results.append({"metric": metric, "batch": name, "pairs_of_packages": scored} | shares(batch) | found)
    if options.json:
        print(json.dumps({"unit": "CPU seconds", "threads": 1, "results": results}))
        return
    console = Console()
    for result in results:
        table = Table("side", title=f"{result['metric']}, {result['batch']}")
        table.add_column("CPU s", justify="right")
        table.add_column(f"{OFFICIAL[result['metric']]} / it", justify="right")
        base = result["seconds"][OFFICIAL[result["metric"]]]
        for side, seconds in result.pop("seconds").items():
            table.add_row(side, f"{seconds:.2f}", f"{base / seconds:.1f}")
        console.print(table, {key: value for key, value in result.items() if key not in ("metric", "batch")})


if __name__ == "__main__":
    main()
