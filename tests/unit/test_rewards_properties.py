"""What every built-in reward owes a policy, whatever it writes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirg.scoring.registry import load_reward

REWARDS = {
    "bleu": ("bleu", {}),
    "bleu coco4": ("bleu", {"variant": "coco4"}),
    "bleu sentence4": ("bleu", {"variant": "sentence4"}),
    "rouge_l": ("rouge_l", {}),
    "label_f1": ("label_f1", {}),
    "label_f1 sides": ("label_f1", {"sides": True, "polarity": "both"}),
    "entity_f1": ("entity_f1", {}),
    "entity_f1 positive": ("entity_f1", {"polarity": "positive", "level": "side"}),
    "ratescore": ("ratescore", {}),
}
SENTENCES = (
    "Small left pleural effusion.",
    "No pneumothorax.",
    "The heart is mildly enlarged.",
    "Possible right lower lobe pneumonia.",
    "Lungs are clear.",
    "Bibasilar atelectasis.",
    "Severe pulmonary edema.",
    "No acute osseous abnormality.",
)
LABELS = {"effusion": 1, "effusion/left": 1, "effusion/right": 0, "cardiomegaly": 0, "pneumothorax": 0}
TEXTS = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from((*SENTENCES, "Findings:", "no", "left", "\n", "\x00", "🫁", "XXXX")), max_size=8).map(
        " ".join
    ),
)
REPORTS = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6, unique=True).map(" ".join)


@pytest.fixture(params=REWARDS, scope="module")
def reward(request):
    name, options = REWARDS[request.param]
    loaded = load_reward(name, options)
    loaded.setup()
    return loaded


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([{}, LABELS])), max_size=4))
def test_any_text_gets_a_number_between_0_and_1_or_none(reward, pairs):
    candidates, references, labels = (list(column) for column in zip(*pairs)) if pairs else ([], [], [])
    scores = reward.score(candidates, references, labels=labels)
    assert len(scores) == len(candidates)
    assert all(score is None or (math.isfinite(score) and 0 <= score <= 1 + 1e-9) for score in scores)


@settings(max_examples=40, deadline=None)
@given(report=REPORTS, other=REPORTS)
def test_the_reference_itself_scores_highest_and_silence_lowest(reward, report, other):
    if reward.name == "label_f1":
        labels = {name: int(name in report) for name in ("effusion", "pneumonia", "atelectasis", "edema")}
    else:
        labels = {}
    same, another, silence, blank = reward.score([report, other, "", " \n"], [report] * 4, labels=[labels] * 4)
    assert same >= another - 1e-9
    assert same == pytest.approx(1) or reward.name == "bleu"  # a report of three words has no 4-gram
    assert silence == pytest.approx(0, abs=1e-4)
    assert blank == pytest.approx(0, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(candidate=st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=5), reference=REPORTS, data=st.data())
@pytest.mark.parametrize("name", ["entity_f1", "ratescore", "label_f1"])
def test_repeating_a_sentence_does_not_pay(name, candidate, reference, data):
    again = data.draw(st.sampled_from(candidate))
    texts = [" ".join(candidate), " ".join([*candidate, *[again] * 5])]
    once, more = load_reward(name).score(texts, [reference] * 2, labels=[LABELS] * 2)
    assert more == (None if once is None else pytest.approx(once))


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(REPORTS, REPORTS), min_size=2, max_size=5))
def test_a_score_does_not_depend_on_the_rest_of_the_batch(reward, pairs):
    candidates, references = (list(column) for column in zip(*pairs))
    labels = [LABELS] * len(pairs)
    alone = [
        reward.score([candidate], [reference], labels=[LABELS])[0]
        for candidate, reference in zip(candidates, references)
    ]
    together = reward.score(candidates, references, labels=labels)
    assert together == [None if value is None else pytest.approx(value) for value in alone]
