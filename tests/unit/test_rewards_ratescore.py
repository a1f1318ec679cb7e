"""RaTEScore: the published algorithm, its edge cases, and the real loading code on tiny models."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification

from tests.ratescore_archives import write_embedder, write_tagger
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward
from unirg_rewards.ratescore import both_directions
from unirg_rewards.ratescore_official import entity_spans, load_strings, load_tagger
from unirg_rewards.ratescore_sentences import split_by_rule
from unirg_rewards.ratescore_weights import NEGATION, TYPES, WEIGHTS

REFERENCE = "Small left pleural effusion. Mild cardiomegaly. No pneumothorax."

REPORTS = [
    "Small left pleural effusion. The heart is normal in size.",
    "No pneumothorax. The lungs are clear with no focal opacity.",
    "Severe edema and bilateral opacity. No acute cardiopulmonary process; tube ends above the carina.",
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


def test_sentences_by_the_rule():
    assert split_by_rule("No effusion.  Heart is large.\nok\n\nAorta 3.5 cm.") == [
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options for folders of the published models' architectures, tiny, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    folders = {"ner": write_tagger(folder / "ner", o_bias=-2), "embedder": write_embedder(folder / "embedder")}
    return {"backend": "official", "sentences": "rule"} | {name: str(path) for name, path in folders.items()}


def fresh(models):
    """The reward with models of its own: nothing is remembered."""
    load_tagger.cache_clear()
    load_strings.cache_clear()
    reward = load_reward("ratescore", models)
    reward.setup()
    return reward


def test_the_official_backend_scores_from_model_folders(models):
    reward = fresh(models)
    assert sum(map(len, reward.written.models.entities(REPORTS))) > 5  # else the test would show nothing
    scores = reward.score(REPORTS + REPORTS, REPORTS + REPORTS[1:] + REPORTS[:1])
    assert scores[:3] == pytest.approx([1, 1, 1], abs=1e-5)
    assert all(score is not None and 0 <= score <= 1 for score in scores)
    assert len({round(score, 6) for score in scores}) > 2
    assert reward.score(["", "x"], REPORTS[:2])[0] == 0
    json.dumps(reward.identity)
    assert reward.identity["ner"] == models["ner"] and reward.identity["sentences"] == "rule"
    assert reward.identity["ner_weights"] != reward.identity["embedder_weights"]


def test_batched_and_remembered_is_as_alone(models):
    texts = [*REPORTS, "Effusion " * 700, "[PAD] heart [SEP] large [CLS]", REPORTS[0] + " " + REPORTS[1]]
    pairs = [(a, b) for a in texts for b in texts]
    candidates, references = [list(side) for side in zip(*pairs)]
    together = fresh(models | {"official_edges": True})
    values = together.score(candidates, references)
    alone = [fresh(models | {"official_edges": True}).score([a], [b])[0] for a, b in pairs[::5]]
    assert values[::5] == pytest.approx(alone, abs=1e-6)
    assert together.score(candidates[::-1], references[::-1]) == pytest.approx(values[::-1], abs=1e-6)
    assert len({round(value, 4) for value in values}) > 5


@pytest.mark.parametrize("buckets", [256, 16])  # long texts go beyond half of 16 buckets, where these are logarithmic
def test_the_narrow_table_of_positions_changes_nothing(tmp_path, buckets):
    tagger = load_tagger(str(write_tagger(tmp_path / "ner", buckets=buckets)), "cpu").encoder
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "ner").eval()
    texts = ["heart", "small left effusion " * 4, "no effusion " * 30, "severe edema of the heart " * 100]
    ids = tagger.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    assert [len(row) > 17 for row in ids] == [False, False, True, True]
    for rows, logits_BTL in tagger.batches(ids[::-1]):
        for row, logits_TL in zip(rows, logits_BTL, strict=True):
            expected_TL = plain(torch.tensor([ids[::-1][row]])).logits[0].detach()
            assert logits_TL[: len(expected_TL)].numpy() == pytest.approx(expected_TL.numpy(), abs=2e-5)


def test_two_rewards_of_the_same_models_share_them(models):
    one, other = fresh(models), load_reward("ratescore", models | {"weights": "short"})
    other.setup()
    assert one.written.models._tagger is other.written.models._tagger
    assert one.written.shares == other.written.shares != load_reward("ratescore").written.shares


@pytest.mark.parametrize("role", ["ner", "embedder"])
def test_a_model_folder_that_is_not_there_is_named(models, role):
    with pytest.raises(RewardError, match=r"/no/such/folder cannot be loaded.*config.json"):
        load_reward("ratescore", models | {role: "/no/such/folder"}).setup()


def test_a_model_without_a_head_or_with_other_labels_is_refused(models, tmp_path):
    folder = write_tagger(tmp_path / "ner")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "classifier" not in key}, folder / "model.safetensors")
    with pytest.raises(RewardError, match=r"lacks 2 weights.*classifier.bias"):
        load_reward("ratescore", models | {"ner": str(folder)}).setup()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["3"] = "B-DEVICE"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match=r"tags .*B-DEVICE"):
        load_reward("ratescore", models | {"ner": str(folder)}).setup()


def test_without_upstreams_splitter_it_says_what_to_install(models):
    if importlib.util.find_spec("PyRuSH"):
        pytest.skip("PyRuSH is installed")
    with pytest.raises(RewardError, match=r"pip install .*PyRuSH.*sentences: rule"):
        load_reward("ratescore", models | {"sentences": "pyrush"}).setup()
    with pytest.raises(RewardError, match="neither pyrush nor rule"):
        load_reward("ratescore", models | {"sentences": "words"})
