"""BLEU and ROUGE-L against published values and official implementations."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from unirg.scoring.registry import load_reward
from unirg_rewards.bleu import VARIANTS, corpus_bleu

WORDS = st.lists(st.sampled_from(["left", "right", "small", "effusion", "no", "heart"]), min_size=1, max_size=14)


def reference_folder(name):
    if "UNIRG_REFERENCE" not in os.environ:
        pytest.skip("UNIRG_REFERENCE (the reference data) is not set")
    return Path(os.environ["UNIRG_REFERENCE"]) / name


@pytest.fixture(scope="module")
def published():
    folder = reference_folder("radeval")
    pairs = json.loads((folder / "regression_pairs.json").read_text())
    return pairs["hyps"], pairs["refs"], json.loads((folder / "expected_scores_cpu.json").read_text())


def test_radevals_published_corpus_bleu(published):
    candidates, references, expected = published
    for order in (1, 2, 3):
        value = corpus_bleu(candidates, references, order)
        assert value == pytest.approx(expected["detailed"][f"bleu_{order}"], abs=5e-5)
    assert corpus_bleu(candidates, references) == pytest.approx(expected["default"]["bleu"], abs=5e-5)


def test_radevals_published_scores_per_report(published):
    candidates, references, expected = published
    bleu = load_reward("bleu", {"variant": "coco4"}).score(candidates, references)
    assert bleu == pytest.approx(expected["per_sample"]["bleu"], rel=1e-9)
    rouge = load_reward("rouge_l").score(candidates, references)
    assert rouge == pytest.approx(expected["per_sample"]["rougeL"], rel=1e-9)


def test_radevals_published_gallery_of_single_pairs():
    folder = reference_folder("radeval")
    gallery = json.loads((folder / "trl_rewards_260429.json").read_text())["divergence"]
    assert len(gallery) == 8
    score = load_reward("bleu", {"variant": "coco4"}).score
    ours = score([pair["hyp"] for pair in gallery], [pair["ref"] for pair in gallery])
    assert ours == pytest.approx([pair["scores"]["bleu"] for pair in gallery], rel=1e-9)


def test_a_three_word_match_as_published():
    # the metric kit of UniRG-CXR prints 1, 1, 1 and .03 for the same three words twice, ROUGE-L 1
    pair = ["heart is normal"], ["heart is normal"]
    orders = [load_reward("bleu", {"variant": f"coco{order}"}).score(*pair)[0] for order in (1, 2, 3, 4)]
    assert orders == pytest.approx([1, 1, 1, 0.0316], abs=5e-5)
    assert load_reward("rouge_l").score(*pair) == [1]


@settings(deadline=None)
@given(WORDS, WORDS)
def test_rexrank_bleu_is_nltks_bleu_2_with_smoothing_method_1(candidate, reference):
    expected = sentence_bleu([reference], candidate, weights=(0.5, 0.5), smoothing_function=SmoothingFunction().method1)
    [score] = load_reward("bleu").score([" ".join(candidate)], [" ".join(reference)])
    assert score == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["left", "right", "no"]), min_size=4, max_size=14), WORDS)
def test_sentence4_is_nltks_bleu_4_with_smoothing_method_2(candidate, reference):
    # nltk's add-one smoothing equals Lin & Och's where the candidate has four words (below that they differ)
    expected = sentence_bleu([reference], candidate, smoothing_function=SmoothingFunction().method2)
    [score] = load_reward("bleu", {"variant": "sentence4"}).score([" ".join(candidate)], [" ".join(reference)])
    assert score == pytest.approx(expected, abs=1e-12)


def test_rexranks_tokens_split_the_full_stop_only():
    score = load_reward("bleu").score
    assert score(["No effusion ."], ["no EFFUSION."]) == [1.0]
    assert score(["no effusion , no edema"], ["no effusion, no edema"])[0] < 1


def test_sentence4_gives_a_short_exact_match_full_score_and_coco4_none():
    assert load_reward("bleu", {"variant": "sentence4"}).score(["Normal."], ["Normal."]) == [1.0]
    assert load_reward("bleu", {"variant": "coco4"}).score(["Normal."], ["Normal."])[0] < 1e-3


@pytest.mark.parametrize("options", [{"variant": name} for name in VARIANTS])
def test_bleu_masks_a_missing_reference_and_gives_silence_nothing(options):
    scores = load_reward("bleu", options).score(["", "  \n", "Normal chest.", ""], ["Normal.", "Normal.", " ", ""])
    assert scores[:2] == pytest.approx([0, 0], abs=1e-4)
    assert scores[2:] == [None, None]


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_l_is_the_official_f1_wherever_the_reference_has_words(candidate, reference):
    [score] = load_reward("rouge_l").score([candidate], [reference])
    if score is None:
        assert not any(letter in "abcdefghijklmnopqrstuvwxyz0123456789" for letter in reference.lower())
    else:
        official = RougeScorer(["rougeL"], use_stemmer=True).score(reference, candidate)["rougeL"].fmeasure
        assert score == official
