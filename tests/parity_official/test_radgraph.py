"""RadGraph beside radgraph 0.1.18 on the same archives with random weights: annotations and scores, report by report.

The package needs transformers 4 and runs under the interpreter that UNIRG_RADGRAPH_PYTHON names; `make test-parity`
makes one.
"""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.radgraph_archives import WORDS, write_archive
from unirg_rewards.radgraph_f1 import LEVELS, RadGraphF1
from unirg_rewards.radgraph_text import MODELS

ODD = [
    "no",
    ".",
    "None",
    "TUBE ENDS ABOVE THE CARINA; NO PNEUMOTHORAX.",
    "Findings:\n\n1. Small (left) effusion, 3.5cm.\n2. Heart/size normal?!",
    "non-focal opacity - likely edema, 50%). right lower-lobe.' ok",
    'literal \\n and \\f and \\u2122 and \\" in it',
    "left /. right /? mild",
    "œdème léger — cœur élargi, 2×3 cm, 37°C…",
    "左肺 pleural effusion 🫁 🫁",
    "[SEP] no [MASK] effusion [CLS] ## ##a",
    "zero\u200bwidth \u200b and non\u00a0breaking \u00ad soft",
    "\x00 \x07 control \x1f characters",
    "edema " * 40,
    "a" * 150,
    "xyzzy plugh qwerty",
    ", , , . . .",
    "the heart is enlarged\r\nthe heart is enlarged\tthe heart is enlarged",
]


def invented_reports() -> list[str]:
    """Sentences of known and unknown words in any case, of 2 to 150 words: some are folded, by rows and within one."""
    rng = random.Random(0)
    words = [*WORDS.split(), "perihilar", "Streaky", "XXXX", "3.5", "C7-T1", "(stable)", "w/o", "50%"]
    reports = []
    for length in [2, 3, 5, 8, 13, 20, 30, 40, 60, 61, 62, 63, 64, 65, 66, 126, 127, 128, 130, 150]:
        text = " ".join(rng.choice(words) for _ in range(length))
        reports.append(text.capitalize().replace(" of ", ". ").replace(" and ", ", ") + ".")
    return reports


@pytest.fixture(scope="module")
def official():
    """Runs the package on a request; see `official_radgraph.py`."""
    python = os.environ.get("UNIRG_RADGRAPH_PYTHON", "")
    if not Path(python).is_file() or subprocess.run([python, "-c", "import radgraph"], capture_output=True).returncode:
        pytest.skip("UNIRG_RADGRAPH_PYTHON names no Python with the radgraph package (make test-parity makes one)")

    def run(folder, model, candidates, references):
        script = Path(__file__).with_name("official_radgraph.py")
        request = {
            "package": "radgraph",
            "folder": str(folder),
            "model": model,
            "candidates": candidates,
            "references": references,
        }
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [python, script], input=json.dumps(request), capture_output=True, text=True, env=environment
        )
        assert not done.returncode, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("model", MODELS)
def test_annotations_and_scores_are_the_packages(official, model, tmp_path):
    folder = write_archive(tmp_path, model, ner_bias=-1.2, relation_bias=0.3)
    references = [*invented_reports(), *ODD]
    # The reference, the reference without its last words, and another one's.
    shorter = [" ".join(text.split()[:-2]) or text for text in references]
    candidates = [(text, less, other)[i % 3] for i, (text, less, other) in enumerate(zip(references, shorter, ODD * 3))]
    answer = official(folder, model, [*candidates, "", "no"], [*references, "no", ""])

    ours = {level: RadGraphF1(level, model, str(folder), case="pypi", max_words=10_000) for level in LEVELS}
    for texts, side in ((candidates, "candidates"), (references, "references")):
        annotations = ours["simple"].annotate(texts)
        for text, annotation, expected in zip(texts, annotations, answer[side], strict=True):
            assert annotation == expected["entities"], f"{side}: {text!r}"
    found = [entity for annotation in annotations for entity in annotation.values()]
    assert len(found) > 200 and sum(len(entity["relations"]) for entity in found) > 200  # else this would show little

    for level, expected in zip(LEVELS, answer["rewards"]):
        assert len({round(value, 6) for value in expected}) > 5
        values = ours[level].values([*candidates, "", "no"], [*references, "no", ""])
        assert values == pytest.approx(expected, abs=1e-6), level
