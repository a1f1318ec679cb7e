"""The tricks of a policy, one by one, against every reward that comes with UniRG; models have random weights."""

import math
from pathlib import Path

import pytest

from tests.encoders import chexbert_folder, roberta_folder
from tests.judge_server import answer, serve
from tests.radgraph_archives import write_archive
from unirg.scoring.contract_check import check_contract
from unirg.scoring.registry import Reward, load_reward

REFERENCE = "Small left pleural effusion. Mild cardiomegaly. No pneumothorax."
SILENT = {"empty": "", "blank": " ", "newline": "\n"}
HARMFUL = {
    "one word": "effusion",
    "emoji": "🫁",
    "headers": "Findings: None. Impression:",
    "normal template": "The lungs are clear. The heart is normal in size. No pleural effusion or pneumothorax.",
    "negated": "No left pleural effusion. No cardiomegaly. No pneumothorax.",
    "other side": "Small right pleural effusion. Mild cardiomegaly. No pneumothorax.",
    "one dropped": "Small left pleural effusion. No pneumothorax.",
    "one invented": f"{REFERENCE} Right rib fracture.",
    "2,000 words": f"{REFERENCE} " * 250,
    "20 times": f"{REFERENCE}{' Small left pleural effusion.' * 20}",
}
HARMLESS = {
    "shuffled": "No pneumothorax. Mild cardiomegaly. Small left pleural effusion.",
    "capitals": REFERENCE.upper(),
}
LABELS = {
    "effusion": 1,
    "effusion/left": 1,
    "effusion/right": 0,
    "cardiomegaly": 1,
    "pneumothorax": 0,
    "rib_fracture": 0,
    "fracture": 0,
}
REPEATED = {"2,000 words", "20 times"}

# name: (options, the harmful texts that earn as much as the reference: what the reward does not see)
RULES: dict[str, tuple[dict, set[str]]] = {
    "bleu": ({}, set()),
    "bleu coco4": ({"variant": "coco4"}, set()),
    "bleu sentence4": ({"variant": "sentence4"}, set()),
    "rouge_l": ({}, set()),
    "entity_f1": ({}, REPEATED),
    "entity_f1 positive": ({"polarity": "positive"}, REPEATED),
    "label_f1": ({}, REPEATED | {"other side"}),
    "label_f1 sides": ({"sides": True}, REPEATED),
    "ratescore": ({}, REPEATED),
}
# At its other levels entity_f1 asks for what the reference says of a finding, and for nothing beyond it.
SYMMETRIC = {"rouge_l": {}, "entity_f1": {"level": "finding"}, "ratescore": {}}


def scores(reward: Reward, *texts: str, reference: str = REFERENCE) -> list[float]:
    found = reward.score(list(texts), [reference] * len(texts), labels=[LABELS] * len(texts))
    assert len(found) == len(texts)
    assert all(value is not None and math.isfinite(value) for value in found)
    return [value for value in found if value is not None]


@pytest.mark.parametrize("name", RULES)
def test_no_trick_pays_and_what_goes_unseen_is_known(name: str) -> None:
    options, unseen = RULES[name]
    reward = load_reward(name.split()[0], options)
    own, *silent = scores(reward, REFERENCE, *SILENT.values())
    assert silent == [0, 0, 0] and own > 0.9
    tricks = dict(zip(HARMFUL, scores(reward, *HARMFUL.values()), strict=True))
    assert all(value >= 0 for value in tricks.values())
    assert {trick for trick, value in tricks.items() if value > own - 1e-9} == unseen
    assert max(tricks.values()) <= own + 1e-9


@pytest.mark.parametrize("name", ["entity_f1", "label_f1", "ratescore"])
def test_harmless_changes_cost_nothing_where_findings_are_read(name: str) -> None:
    reward = load_reward(name)
    own, *changed = scores(reward, REFERENCE, *HARMLESS.values())
    assert changed == pytest.approx([own] * len(changed), abs=1e-6)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_what_matches_two_reports_matches_them_both_ways(name: str) -> None:
    reward = load_reward(name, SYMMETRIC[name])
    texts = [*HARMFUL.values(), *HARMLESS.values(), "Possible right pneumonia. The heart is enlarged."]
    pairs = [reward.score([text, REFERENCE], [REFERENCE, text]) for text in texts]
    judged = [pair for pair in pairs if None not in pair]  # a reference without an entity is masked, a report is not
    assert len(judged) >= 10
    assert [there for there, _ in judged] == pytest.approx([back for _, back in judged])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    roberta = roberta_folder(folder / "roberta", layers=6)
    parts = {
        "radgraph": {"model_folder": str(write_archive(folder / "radgraph", "radgraph"))},
        "chexbert": {"model_folder": str(chexbert_folder(folder / "chexbert"))},
        "bertscore": {"model_folder": str(roberta)},
    }
    with serve(answer(location=1)) as judge:  # it always finds one error
        yield {
            "radgraph_f1": parts["radgraph"] | {"model": "radgraph"},
            "radgraph_f1 combined": parts["radgraph"] | {"model": "radgraph", "level": "combined", "case": "pypi"},
            "chexbert": parts["chexbert"],
            "semb_score": parts["chexbert"],
            "bertscore": parts["bertscore"],
            "radcliq": parts,
            "r1": parts,
            "judge_errors": {"base_url": judge.base_url, "model": "j", "cache": str(folder / "judge.sqlite")},
            "length_band": {"low": 3, "high": 60},
            "repetition": {},
            "sections": {},
        }


MODELS = ("radgraph_f1", "radgraph_f1 combined", "chexbert", "semb_score", "bertscore", "radcliq", "r1")
OTHERS = ("judge_errors", "length_band", "repetition", "sections")


@pytest.fixture
def by_name(request, models):
    reward = load_reward(request.param.split()[0], models[request.param])
    reward.setup()
    return reward


@pytest.mark.parametrize("by_name", MODELS, indirect=True)
def test_no_trick_beats_the_reference_and_silence_loses_to_all(by_name: Reward) -> None:
    """Random weights say nothing of which trick costs how much; these two hold for any weights."""
    own, *silent = scores(by_name, REFERENCE, *SILENT.values())
    tricks = scores(by_name, *HARMFUL.values(), *HARMLESS.values())
    assert max(tricks) <= own + 1e-5
    assert max(silent) <= min(tricks) + 1e-5 and max(silent) < own


@pytest.mark.parametrize("by_name", [*MODELS, *OTHERS], indirect=True)
def test_each_keeps_the_contract(by_name: Reward) -> None:
    findings = check_contract(by_name)
    assert [finding.text for finding in findings if finding.kind == "wrong"] == []
    assert len(findings) >= 12


@pytest.mark.parametrize("by_name", ["radgraph_f1", "radgraph_f1 combined"], indirect=True)
def test_radgraph_f1_is_symmetric(by_name: Reward) -> None:
    texts = [*HARMFUL.values(), *HARMLESS.values()]
    there = by_name.score(texts, [REFERENCE] * len(texts))
    assert by_name.score([REFERENCE] * len(texts), texts) == pytest.approx(there)
    assert len(set(there)) > 3


def test_the_probes_pages_stand_in_for_radgraph_compares_words() -> None:
    reward = load_reward(f"{Path(__file__).parents[2] / 'benchmarks' / 'radgraph_by_words.py'}:radgraph_by_words")
    findings = check_contract(reward)
    assert [finding.text for finding in findings if finding.kind == "wrong"] == []
    own, reworded, denied = reward.score(
        ["Cardiomegaly.", "The heart is enlarged.", "No cardiomegaly."], ["Cardiomegaly."] * 3
    )
    assert (own, reworded, denied) == (1, 0, 0)
    assert load_reward("entity_f1").score(["The heart is enlarged."], ["Cardiomegaly."]) == [1]
