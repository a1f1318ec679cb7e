"""CIDEr-D: values by hand, and why its document frequencies are fixed."""

import json
import math

import pytest

from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward


def cider(tmp_path, reports):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"report": report}) + "\n" for report in reports))
    return load_reward("cider", {"corpus": str(file)})


CORPUS = ["heart normal", "lungs clear", "heart large", "no effusion"]


def test_an_exact_match_scores_10_times_the_share_of_orders_it_has(tmp_path):
    long = "one two three four"
    assert cider(tmp_path, CORPUS).score([long, "heart normal"], [long, "heart normal"]) == pytest.approx([10, 5])


def test_one_word_in_common(tmp_path):
    # idf: heart log(4/2), normal and large log(4/1); no other n-gram is shared, and the lengths agree
    heart, other = math.log(2), math.log(4)
    expected = 10 / 4 * heart**2 / (heart**2 + other**2)
    assert cider(tmp_path, CORPUS).score(["heart large"], ["heart normal"]) == [pytest.approx(expected)]


def test_repeating_is_clipped_and_length_is_punished(tmp_path):
    reward = cider(tmp_path, CORPUS)
    once, often = reward.score(["lungs clear", "lungs clear lungs clear lungs clear"], ["lungs clear"] * 2)
    # unigrams keep their direction but are clipped to a third, bigrams are clipped too; the lengths differ by 4 bigrams
    rare = math.log(4)
    pairs = {("lungs", "clear"): 3, ("clear", "lungs"): 2}
    bigrams = rare * rare / (rare * rare * math.sqrt(sum(count**2 for count in pairs.values())))
    expected = 10 / 4 * (1 / 3 + bigrams) * math.exp(-(4**2) / 72)
    assert often == pytest.approx(expected) and often < once


def test_a_score_does_not_depend_on_the_batch(tmp_path):
    reward = cider(tmp_path, CORPUS)
    alone = reward.score(["heart large"], ["heart normal"])[0]
    assert alone > 0  # frequencies of this one reference would be log(1) = 0
    assert reward.score(["heart large"] * 3, ["heart normal", "lungs clear", "no effusion"])[0] == alone


def test_blank_reports(tmp_path):
    assert cider(tmp_path, CORPUS).score(["", " \n", "heart", ""], ["heart", "heart", " ", ""]) == [0, 0, None, None]


def test_a_corpus_is_asked_for(tmp_path):
    with pytest.raises(RewardError, match=r"needs `corpus`.*references under evaluation"):
        load_reward("cider")
    with pytest.raises(RewardError, match=r"no/file\.jsonl cannot be read"):
        load_reward("cider", {"corpus": "/no/file.jsonl"})
    identity = cider(tmp_path, CORPUS).identity
    assert identity["corpus reports"] == 4 and len(identity["corpus"]) == 16
