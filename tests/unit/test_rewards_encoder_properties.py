"""What the rewards that run a text encoder owe a policy, whatever it writes; on tiny models with random weights."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.encoders import ODD, REPORTS, chexbert_folder, roberta_folder
from tests.radgraph_archives import write_archive
from unirg.scoring.registry import load_reward

LEAST = {
    "chexbert": 0,
    "chexbert five": 0,
    "semb_score": -1,
    "bertscore": -1,
    "bertscore plain": 0,
    "bertscore idf": -1,
}
LEAST |= {"cider": 0, "radcliq": -5.0958, "r1": -0.623}
MOST = dict.fromkeys(LEAST, 1) | {"cider": 10, "radcliq": 1.4408}
SYMMETRIC = {"chexbert", "chexbert five", "semb_score", "bertscore", "bertscore plain", "bertscore idf"}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from((*REPORTS, *ODD[:9], "Findings:", "no", "\n", "\x00")), max_size=4).map(" ".join),
)
WRITTEN = st.lists(st.sampled_from(REPORTS), min_size=1, max_size=4, unique=True).map(" ".join)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"report": report}) + "\n" for report in REPORTS))
    chexbert = {"model_folder": str(chexbert_folder(folder / "chexbert"))}
    roberta = roberta_folder(folder / "roberta", layers=6)
    plain = {"model": "tiny", "model_folder": str(roberta), "layer": 2, "rescale": False}
    write_archive(folder / "radgraph", "radgraph")
    composite = {"radgraph": {"model_folder": str(folder / "radgraph")}, "chexbert": chexbert}
    composite |= {"bertscore": {"model_folder": str(roberta)}}
    rescaled = plain | {"rescale": True, "baseline": str(roberta / "baseline.tsv")}
    return {
        "chexbert": chexbert,
        "chexbert five": chexbert | {"classes": 5, "uncertain": "negative"},
        "semb_score": chexbert,
        "bertscore": rescaled,
        "bertscore plain": plain,
        "bertscore idf": rescaled | {"idf_corpus": str(corpus)},
        "cider": {"corpus": str(corpus)},
        "radcliq": composite,
        "r1": composite,
    }


@pytest.fixture(params=LEAST, scope="module")
def case(request, options):
    reward = load_reward(request.param.split()[0], options[request.param])
    reward.setup()
    return request.param, reward


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
def test_any_text_gets_a_number_in_range_or_none(case, pairs):
    name, reward = case
    candidates, references = (list(column) for column in zip(*pairs)) if pairs else ([], [])
    scores = reward.score(candidates, references)
    assert len(scores) == len(candidates)
    for score, reference in zip(scores, references):
        assert score is not None or not any(letter.isalnum() and letter.isascii() for letter in reference)
        assert score is None or (math.isfinite(score) and LEAST[name] - 1e-4 <= score <= MOST[name] + 1e-4)


@settings(max_examples=10, deadline=None)
@given(report=WRITTEN, other=WRITTEN)
def test_the_reference_itself_scores_highest_and_silence_lowest(case, report, other):
    name, reward = case
    same, another, silence, blank = reward.score([report, other, "", " \n"], [report] * 4)
    assert same >= another - 1e-5
    if name in SYMMETRIC:  # CIDEr of three words has no 4-gram, RadGraph may read no relation
        assert same == pytest.approx(MOST[name], abs=1e-5)
    assert silence == blank == pytest.approx(LEAST[name], abs=1e-4)
    assert silence <= another


@settings(max_examples=10, deadline=None)
@given(one=WRITTEN, other=WRITTEN)
def test_symmetric_metrics_are(case, one, other):
    name, reward = case
    if name in SYMMETRIC:
        there, back = reward.score([one, other], [other, one])
        assert there == pytest.approx(back, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(pairs=st.lists(st.tuples(WRITTEN, WRITTEN), min_size=2, max_size=5))
def test_a_score_does_not_depend_on_the_rest_of_the_batch(case, options, pairs):
    name, reward = case
    candidates, references = (list(column) for column in zip(*pairs))
    alone = [load_reward(reward.name, options[name]).score([a], [b])[0] for a, b in pairs]
    assert reward.score(candidates, references) == pytest.approx(alone, abs=1e-5)
