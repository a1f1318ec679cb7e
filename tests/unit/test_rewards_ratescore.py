"""RaTEScore: the published algorithm, its edge cases, and the real loading code on tiny models."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    DebertaV2Config,
    DebertaV2ForTokenClassification,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
)

from unirg.scoring.registry import load_reward
from unirg_rewards.ratescore import both_directions
from unirg_rewards.ratescore_official import entity_spans, split_sentences
from unirg_rewards.ratescore_weights import NEGATION, TYPES, WEIGHTS

REFERENCE = "Small left pleural effusion. Mild cardiomegaly. No pneumothorax."

REPORTS = [
    "small left pleural effusion . heart is large .",
    "no pneumothorax . the lungs are clear .",
    "heart is large . no pleural effusion .",
]


def published_direction(vectors_a, types_a, vectors_b, types_b, which):
    """Equations 4 to 6 of the paper as loops over names, for comparison."""
    opposite = {("DISEASE", "NON-DISEASE"), ("DISEASE", "NON-ABNORMALITY")}
    opposite |= {("ABNORMALITY", "NON-DISEASE"), ("ABNORMALITY", "NON-ABNORMALITY")}
    top = bottom = 0.0
    for a, kind_a in zip(vectors_a, types_a):
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors_b]
        j = int(np.argmax(cosines))
        weight = WEIGHTS[which][TYPES.index(kind_a)][TYPES.index(types_b[j])]
        flipped = (kind_a, types_b[j]) in opposite or (types_b[j], kind_a) in opposite
        top += cosines[j] * weight * (NEGATION[which] if flipped else 1)
        bottom += weight
    return top / bottom


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.sampled_from(["long", "short"]))
def test_both_directions_are_the_published_formula(seed, count_r, count_c, which):
    rng = np.random.default_rng(seed)
    vectors_r, vectors_c = rng.standard_normal((count_r, 8)), rng.standard_normal((count_c, 8))
    types_r, types_c = rng.integers(0, 5, count_r), rng.integers(0, 5, count_c)
    names_r, names_c = [TYPES[i] for i in types_r], [TYPES[i] for i in types_c]
    ours = both_directions(vectors_r, types_r, vectors_c, types_c, which)
    assert ours[0] == pytest.approx(published_direction(vectors_r, names_r, vectors_c, names_c, which), abs=1e-9)
    assert ours[1] == pytest.approx(published_direction(vectors_c, names_c, vectors_r, names_r, which), abs=1e-9)


@pytest.mark.parametrize(
    ("which", "one", "other", "published"),
    [
        ("long", "DISEASE", "ANATOMY", 0.9950209388542061),
        ("long", "ANATOMY", "DISEASE", 0.4592143222158069),
        ("long", "NON-ABNORMALITY", "NON-ABNORMALITY", 0.0009357166071730684),
        ("long", "ABNORMALITY", "NON-DISEASE", 0.27005425386213877),
        ("short", "ANATOMY", "DISEASE", 0.0006059634829551632),
        ("short", "NON-DISEASE", "ABNORMALITY", 0.9555801066212176),
    ],
)
def test_the_weights_are_the_published_ones_the_right_way_round(which, one, other, published):
    assert WEIGHTS[which][TYPES.index(one), TYPES.index(other)] == published


def test_the_negation_weights_are_the_published_ones():
    assert NEGATION == {"long": 0.8716553966489615, "short": 0.3611577852354489}


def test_a_string_with_two_types_matches_its_own_type():
    same = np.ones((2, 3))
    affirmed, denied = TYPES.index("DISEASE"), TYPES.index("NON-DISEASE")
    forward, _ = both_directions(same[:1], np.array([denied]), same, np.array([affirmed, denied]), "long")
    assert forward == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("O B I I O", [(1, 3)]),
        ("B O B O", [(0, 0), (2, 2)]),
        ("B B I O", [(0, 0), (1, 2)]),
        ("B I B I O", [(0, 1), (2, 3)]),
        ("O I I O", []),  # nothing opened it
        ("O O B I", [(2, 3)]),  # open at the sentence's end
        ("B I B I", [(0, 1)]),  # upstream loses the second: an entity had ended since the last O
    ],
)
def test_labels_become_entities_as_upstream_reads_them(labels, spans):
    words = labels.split()
    tokens = ["[CLS]", *(f"w{i}" for i in range(len(words))), "[SEP]"]
    # The tagger labels the closing token too; I- keeps the last entity open, anything else would close it.
    after = "I-ANATOMY" if words[-1] == "I" else "O"
    tagged = ["O", *(word if word == "O" else f"{word}-ANATOMY" for word in words), after]
    assert entity_spans(tokens, tagged) == [(first + 1, last + 1, "ANATOMY") for first, last in spans]


def test_sentences():
    assert split_sentences("No effusion.  Heart is large.\nok\n\nAorta 3.5 cm.") == [
        "No effusion.",
        "Heart is large.",
        "Aorta 3.5 cm.",
    ]


def test_identical_reports_score_1_and_silence_0():
    score = load_reward("ratescore").score
    assert score([REFERENCE], [REFERENCE]) == [pytest.approx(1)]
    assert score(["", " ", "Thank you for the referral."], [REFERENCE] * 3) == [0, 0, 0]


def test_a_reference_without_entities_is_masked():
    assert load_reward("ratescore").score([REFERENCE, ""], ["Thank you.", ""]) == [None, None]


def test_official_edges_give_upstreams_half_point():
    score = load_reward("ratescore", {"official_edges": True}).score
    assert score(["", REFERENCE, ""], [REFERENCE, "", ""]) == [0.5, 0.5, 0.5]


def test_repeating_a_sentence_pays_upstream_and_not_here():
    wrong = "Left pleural effusion. Healed rib fracture."
    repeated = "Left pleural effusion. " * 20 + "Healed rib fracture."
    once, many = load_reward("ratescore").score([wrong, repeated], ["Left pleural effusion."] * 2)
    assert many == pytest.approx(once)
    once, many = load_reward("ratescore", {"official_edges": True}).score([wrong, repeated], [REFERENCE] * 2)
    assert many > once


def test_a_better_report_scores_higher():
    candidates = [
        "Small left effusion. Mildly enlarged heart. No pneumothorax.",
        "Small left effusion. No pneumothorax.",
        "Left pneumothorax.",
    ]
    scores = load_reward("ratescore").score(candidates, [REFERENCE] * 3)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.99


def _tokenizer(folder, words):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the published models' architectures, tiny, with random weights."""
    torch.manual_seed(0)
    words = [word for report in REPORTS for word in report.split()]
    words = list(dict.fromkeys(words))
    names = ["O", *(f"{mark}-{kind}" for kind in TYPES for mark in "BI")]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ner, embedder = tmp_path_factory.mktemp("ner"), tmp_path_factory.mktemp("embedder")
    size = _tokenizer(ner, words)
    config = DebertaV2Config(vocab_size=size, id2label=dict(enumerate(names)), **sizes)
    DebertaV2ForTokenClassification(config).save_pretrained(ner)
    _tokenizer(embedder, words)
    MPNetModel(MPNetConfig(vocab_size=size, **sizes)).save_pretrained(embedder)
    return {"backend": "official", "ner": str(ner), "embedder": str(embedder), "device": "cpu"}


def test_the_official_backend_scores_from_model_folders(models):
    reward = load_reward("ratescore", models)
    reward.setup()
    assert sum(map(len, reward.written.models.entities(REPORTS))) > 3  # else the test would show nothing
    scores = reward.score(REPORTS + REPORTS, REPORTS + REPORTS[::-1])
    assert scores[:3] == pytest.approx([1, 1, 1], abs=1e-5)
    assert all(score is not None and 0 <= score <= 1 for score in scores)
    assert reward.score(["", "x"], REPORTS[:2])[0] == 0
    json.dumps(reward.identity)
    assert reward.identity["ner"] == models["ner"]


def test_the_official_backends_entities_do_not_depend_on_the_batch(models):
    together, alone = (load_reward("ratescore", models).written.models for _ in range(2))
    assert together.entities(REPORTS) == [alone.entities([report])[0] for report in REPORTS]
    strings = ["small left pleural effusion", "heart"]
    vectors = np.stack([alone.embed([string])[0] for string in strings])
    assert together.embed(strings) == pytest.approx(vectors, abs=1e-5)


def test_a_model_folder_that_is_not_there_is_named(models):
    with pytest.raises(OSError, match="no/such/folder"):
        load_reward("ratescore", models | {"ner": "/no/such/folder"}).setup()
