"""RaTEScore beside RaTEScore 0.6.0 and RadEval's copy on the same random weights: sentences, entities, scores.

The package runs as a subprocess under this interpreter; `make test-parity` makes one that has it. Where the package has
no right answer ours differs: see the last test.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ratescore_archives import write_embedder, write_tagger
from unirg.scoring.registry import load_reward
from unirg_rewards.ratescore import TIE

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("RaTEScore", "medspacy", "PyRuSH")),
    reason="RaTEScore, medspacy or PyRuSH is not installed (make test-parity makes an environment that has them)",
)

INVENTED = [
    "The heart is normal in size. There is mild cardiomegaly, unchanged. Lungs are clear. No pneumothorax.",
    "FINDINGS: Small left pleural effusion. 3.5 cm opacity in the right lower lobe.\n\nIMPRESSION: 1. No acute "
    "process. 2. Likely edema. 3. Tube ends above the carina",
    "small left effusion . no pneumothorax . the lungs are clear with no focal opacity",
    "TUBE ENDS ABOVE THE CARINA. NO PNEUMOTHORAX. LUNGS ARE CLEAR.",
    "No pleural effusion.. Mild atelectasis is seen... The heart is normal. Dr. Smith was told at 3 p.m. on the 4th.",
    "Findings:\n\n1. Small (left) effusion, 3.5cm.\n2. Heart/size normal?! - severe edema\n* unchanged",
    "The heart is\nnormal in size. Lungs\nare clear.\r\nNo focal consolidation;no effusion.No edema",
    "Severe bilateral consolidation with adjacent atelectasis and likely small effusion, unchanged.",
    "No focal XXXX. XXXX opacity is unchanged. C7-T1 (stable).",
    "œdème léger — cœur élargi, 2×3 cm, 37°C… left effusion",
    "左肺 pleural effusion 🫁 🫁 no edema.",
    "[SEP] no [MASK] effusion [CLS] ## ##a [PAD] small edema",
    "zero\u200bwidth \u200b and non\u00a0breaking \u00ad soft effusion",
    "\x00 \x07 control \x1f characters of the heart",
    "a" * 150,
    "edema and effusion " * 180,
    "Mild edema. " * 20,
    "The lungs are clear. " * 3 + "Severe edema.",
    "yes",
]


def reference_reports() -> list[str]:
    """Real texts, where the environment says that they are to be had."""
    texts: list[str] = []
    if os.environ.get("UNIRG_REFERENCE"):
        folder = Path(os.environ["UNIRG_REFERENCE"])
        for file in (folder / "radeval" / "regression_pairs.json", folder / "radjudge" / "radjudge_20.json"):
            texts += _strings(json.loads(file.read_text(encoding="utf-8")))
        texts += _strings(json.loads((folder / "radgraph" / "expected_processed_annotations.json").read_text()))
    if os.environ.get("UNIRG_OPENI") and Path(os.environ["UNIRG_OPENI"]).exists():
        from unirg.data.openi import find_reports, read_reports

        reports = read_reports(find_reports(Path(os.environ["UNIRG_OPENI"])))[::200]
        texts += [f"{report.findings or ''}\n{report.impression or ''}".strip() for report in reports]
    kept = list(dict.fromkeys(text for text in texts if len(text.split()) > 3))
    return kept[:: len(kept) // 40 + 1]


def _strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for each in value for text in _strings(each)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ner = write_tagger(folder / "ner", hidden=64, layers=3, o_bias=-1.0)
    return {"ner": str(ner), "embedder": str(write_embedder(folder / "embedder", hidden=64, layers=3))}


def official(folders, candidates, references, texts=(), package="RaTEScore", weights="long"):
    """What the package answers; see `official_ratescore.py`."""
    script = Path(__file__).with_name("official_ratescore.py")
    request = folders | {"package": package, "weights": weights, "texts": list(texts)}
    request |= {"candidates": candidates, "references": references}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(request), capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


def ours(folders, **options):
    return load_reward("ratescore", folders | {"backend": "official", "official_edges": True} | options)


def tied(models, one, other):
    """Whether an entity of either report is as near to two of the other that differ in type: the package leaves open
    which of them counts."""
    entities = models.entities([one, other])
    if not all(entities):
        return False
    vectors = [models.embed([string for string, _ in side]) for side in entities]
    cosines = np.matmul(*(each if i == 0 else each.T for i, each in enumerate(map(_unit, vectors))))
    for matrix, far in ((cosines, entities[1]), (cosines.T, entities[0])):
        for row in matrix:
            if len({far[index][1] for index in np.flatnonzero(row >= row.max() - TIE)}) > 1:
                return True
    return False


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("package", "weights"), [("RaTEScore", "long"), ("RaTEScore", "short"), ("radeval", "long")])
def test_sentences_entities_and_scores_are_the_packages(folders, package, weights):
    if package == "radeval" and importlib.util.find_spec("radeval") is None:
        pytest.skip("radeval is not installed")
    texts = INVENTED + reference_reports() if (package, weights) == ("RaTEScore", "long") else INVENTED
    # Each text beside itself, beside itself without its last words, and beside others.
    shorter = [" ".join(text.split()[:-2]) or text for text in texts]
    candidates, references = [*texts, *shorter, *texts], [*texts, *texts, *texts[3:], *texts[:3]]
    answer = official(folders, candidates, references, texts, package, weights)

    reward = ours(folders, weights=weights)
    reward.setup()
    models = reward.written.models
    for text, sentences, entities in zip(texts, answer["sentences"], answer["entities"], strict=True):
        assert models._cut(text) == sentences
        assert models.entities([text])[0] == [tuple(entity) for entity in entities], repr(text)
    assert sum(map(len, answer["entities"])) > 100  # else this would show little

    scores = reward.score(candidates, references)
    pairs = list(zip(candidates, references, scores, answer["scores"], strict=True))
    clear = [pair for pair in pairs if not tied(models, *pair[:2])]
    assert len(clear) > 10 and len({round(score, 6) for _, _, _, score in clear}) > 5
    for candidate, reference, score, expected in clear:
        assert score == pytest.approx(expected, abs=1e-6), (candidate, reference)


def test_where_the_package_loses_reports_ours_do_not_move(folders):
    """A report without a sentence has no place in the package's lists: what follows moves up, and fewer scores return.
    Ours gives it the 0.5 of a report without entities."""
    candidates = [INVENTED[0], "", INVENTED[1], "ok"]
    references = [INVENTED[1], INVENTED[7], INVENTED[0], INVENTED[1]]
    lost = official(folders, candidates, references)["scores"]
    kept = official(folders, [candidates[0], candidates[2]], [references[0], references[2]])["scores"]
    scores = ours(folders).score(candidates, references)
    assert len(lost) == 2  # of four
    assert scores == pytest.approx([kept[0], 0.5, kept[1], 0.5], abs=1e-6)
    assert lost[1] != pytest.approx(kept[1], abs=1e-6)  # the third candidate, scored against the second reference
