"""CheXbert F1 and SembScore: what they count, and the checkpoint as published, on a tiny model with random weights."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.encoders import ODD, REPORTS, chexbert_folder
from unirg.evaluation.intervals import corpus_statistic
from unirg.scoring.contract import RewardError, validated_terms
from unirg.scoring.registry import load_reward
from unirg_rewards.chexbert import f1_terms, report_f1
from unirg_rewards.chexbert_model import (
    BLANK,
    CLASSES,
    FIVE,
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    Reading,
    load_chexbert,
)
from unirg_rewards.semb_score import cosine
from unirg_rewards.text_encoder import Encoder

TEXTS = [*REPORTS, *ODD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chexbert_folder(tmp_path_factory.mktemp("chexbert"))


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder that a test may spoil, and its checkpoint's contents."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", torch.load(folder / "chexbert.pth", weights_only=True)


def rows(*positives):
    return [[name in names for name in CLASSES] for names in positives]


def test_the_five_classes_stand_where_the_labeler_has_them():
    five = ["Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion"]
    assert [CLASSES[index] for index in FIVE] == five
    assert (len(CLASSES), CLASSES[0], CLASSES[-1]) == (14, "Enlarged Cardiomediastinum", "No Finding")


@pytest.mark.parametrize(
    ("stated", "wanted", "expected"),
    [
        ([0, 0, 0], [0, 0, 0], 1),  # 0/0: libraries say 0, and would punish every right report of a normal study
        ([1, 0, 0], [0, 0, 0], 0),
        ([0, 0, 0], [1, 0, 0], 0),
        ([1, 1, 0], [0, 1, 1], 1 / 2),
        ([1, 1, 1], [0, 1, 0], 1 / 2),
        ([1, 0, 0], [1, 1, 1], 1 / 2),
    ],
)
def test_f1_of_one_report(stated, wanted, expected):
    assert report_f1(stated, wanted) == expected


def corpus_f1(stated, wanted):
    terms = validated_terms("chexbert", f1_terms(stated, wanted), [str(number) for number in range(len(stated))])
    return {figure: corpus_statistic(rows).value for figure, rows in terms.items()}


def test_corpus_f1_pools_or_averages_the_classes():
    truth = rows({"Edema", "Pneumonia"}, {"Edema"}, {"No Finding"})
    said = rows({"Edema"}, {"Edema", "Fracture"}, {"No Finding"})
    figures = corpus_f1(said, truth)
    assert figures["micro_14"] == pytest.approx(2 * 3 / (4 + 4))
    assert figures["macro_14"] == pytest.approx(2 / 14)  # Edema and No Finding are right, the rest counts 0
    assert figures["micro_5"] == 1
    assert figures["macro_5"] == pytest.approx(1 / 5)


def test_corpus_f1_of_identical_normal_reports():
    normal = rows({"No Finding"})
    figures = corpus_f1(normal, normal)
    assert [figures[name] for name in ("micro_14", "macro_14")] == pytest.approx([1, 1 / 14])
    # nothing positive on either side: there is nothing to take a share of (scikit-learn says 0)
    assert np.isnan(figures["micro_5"]) and np.isnan(figures["macro_5"])


class Scripted:
    """CheXbert with given readings."""

    def __init__(self, **states):
        self.states = states

    def read(self, reports):
        return [
            Reading(tuple(self.states.get(text, [BLANK] * 14)), np.ones(2, np.float32), not text) for text in reports
        ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 / 3),
        ({"uncertain": "negative"}, 1),
        ({"classes": 5}, 2 / 3),
        ({"uncertain": "negative", "classes": 5}, 1),
    ],
)
def test_uncertain_counts_as_the_option_says(options, expected):
    doubted, plain = [BLANK] * 14, [BLANK] * 14
    doubted[1], doubted[4], doubted[7] = POSITIVE, UNCERTAIN, NEGATIVE
    plain[1] = POSITIVE
    reward = load_reward("chexbert", options)
    reward.written._model = Scripted(doubted=doubted, plain=plain)
    assert reward.score(["doubted"], ["plain"]) == [pytest.approx(expected)]


def test_five_classes_see_no_others():
    fracture = [BLANK] * 14
    fracture[11] = POSITIVE
    for classes, expected in ((14, 0), (5, 1)):
        reward = load_reward("chexbert", {"classes": classes})
        reward.written._model = Scripted(fracture=fracture)
        assert reward.score(["fracture"], ["normal"]) == [expected]


@pytest.mark.parametrize(
    ("name", "options"),
    [("chexbert", {"classes": 13}), ("chexbert", {"uncertain": "maybe"}), ("semb_score", {"bart": "x"})],
)
def test_an_option_that_is_none_is_refused(name, options):
    with pytest.raises(RewardError, match=next(iter(options))):
        load_reward(name, options)


def test_the_checkpoint_is_read_as_its_architecture_says(folder):
    """By torch alone, from the file: the encoder's [CLS], each head on its own, the largest of each."""
    from transformers import AutoConfig, BertModel

    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    bert = BertModel(AutoConfig.from_pretrained(folder / "bert-base-uncased")).eval()
    prefix = "module.bert."
    wanted = bert.state_dict().keys()
    bert.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.removeprefix(prefix) in wanted})
    model = load_chexbert(str(folder), None, "cpu")
    for text, reading in zip(TEXTS, model.read(TEXTS)):
        ids = model.encoder.tokenizer(" ".join(text.split()))["input_ids"]
        ids = ids if len(ids) <= 512 else [*ids[:511], ids[-1]]
        with torch.no_grad():
            vector = bert(torch.tensor([ids]))[0][0, 0]
        assert reading.vector_E == pytest.approx(vector.numpy(), abs=1e-5)  # rounding of sums over 512 tokens
        for number, found in enumerate(reading.states):
            head = {part: state[f"module.linear_heads.{number}.{part}"] for part in ("weight", "bias")}
            assert found == int((head["weight"] @ vector + head["bias"]).argmax())
    assert len({reading.states for reading in model.read(TEXTS)}) > 5  # else this would show little


def test_a_report_is_read_up_to_512_tokens(folder):
    model = load_chexbert(str(folder), None, "cpu")
    cut, longer, shorter = model.read(["effusion " * 510, "effusion " * 510 + "edema " * 90, "effusion " * 509])
    assert longer.vector_E == pytest.approx(cut.vector_E, abs=1e-5)
    assert np.abs(shorter.vector_E - cut.vector_E).max() > 1e-4


def test_each_distinct_text_is_encoded_once_for_all_rewards(folder, monkeypatch):
    encoded = []
    batches = Encoder.batches
    monkeypatch.setattr(Encoder, "batches", lambda self, ids: encoded.extend(ids) or batches(self, ids))
    load_chexbert.cache_clear()
    candidates, references = [*TEXTS[:4], TEXTS[0]], [TEXTS[5]] * 5
    for name in ("chexbert", "semb_score"):
        reward = load_reward(name, {"model_folder": str(folder)})
        reward.setup()
        assert len(reward.score(candidates, references)) == 5
    assert len(encoded) == 5  # four candidates and their reference


def test_blank_reports(folder):
    # "\x00" is a report without a token, though not an empty string
    candidates, references = ["", " \n", "\x00", REPORTS[0], ""], [*REPORTS[:3], " ", ""]
    assert load_reward("chexbert", {"model_folder": str(folder)}).score(candidates, references) == [0, 0, 0, None, None]
    scores = load_reward("semb_score", {"model_folder": str(folder)}).score(candidates, references)
    assert scores == [-1, -1, -1, None, None]
    # upstream embeds what is empty, and may prefer it to a report that says something
    official = load_reward("semb_score", {"model_folder": str(folder), "official_edges": True})
    there = official.score([*candidates, REPORTS[1]], [*references, REPORTS[0]])
    assert there[0] > -1 and there[4] == pytest.approx(1)
    assert there[5:] == load_reward("semb_score", {"model_folder": str(folder)}).score([REPORTS[1]], [REPORTS[0]])
    assert official.identity["empty candidate"] == "embedded"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([3, 4], [3, 4], 1), ([3, 4], [-6, -8], -1), ([1, 0], [0, 2], 0), ([3, 4], [4, 3], 0.96), ([0, 0], [1, 1], 0)],
)
def test_cosine(one, other, expected):
    assert cosine(np.array(one, np.float32), np.array(other, np.float32)) == pytest.approx(expected, abs=1e-12)


def test_semb_score_is_the_cosine_of_the_readings_vectors(folder):
    reward = load_reward("semb_score", {"model_folder": str(folder)})
    one, other = load_chexbert(str(folder), None, "cpu").read(REPORTS[:2])
    expected = torch.cosine_similarity(torch.tensor(one.vector_E), torch.tensor(other.vector_E), dim=0).item()
    assert reward.score([REPORTS[0]], [REPORTS[1]]) == [pytest.approx(expected, abs=1e-6)]


def test_the_identity_names_the_weights(copied):
    folder, saved = copied
    reward = load_reward("chexbert", {"model_folder": str(folder / "chexbert.pth")})  # the file itself does too
    assert "chexbert" not in reward.identity
    reward.setup()
    before = reward.identity["chexbert"]
    json.dumps(reward.identity)
    saved["model_state_dict"]["module.linear_heads.0.bias"] += 1
    torch.save(saved, folder / "chexbert.pth")
    load_chexbert.cache_clear()
    reward.setup()
    assert reward.identity["chexbert"] != before


def test_the_encoders_files_may_lie_elsewhere(copied):
    folder, _ = copied
    (folder / "bert-base-uncased").rename(folder.parent / "elsewhere")
    options = {"model_folder": str(folder), "bert": str(folder.parent / "elsewhere")}
    assert load_reward("chexbert", options).score([REPORTS[0]], [REPORTS[0]]) == [1]


def test_what_is_missing_is_named(copied):
    folder, saved = copied
    with pytest.raises(RewardError, match=r"/no/such/folder.*chexbert\.pth"):
        load_reward("chexbert", {"model_folder": "/no/such/folder"}).setup()
    with pytest.raises(RewardError, match=r"/no/bert.*option `bert`"):
        load_reward("semb_score", {"model_folder": str(folder), "bert": "/no/bert"}).setup()
    state = saved["model_state_dict"]
    for change, message in (
        (lambda: state.pop("module.linear_heads.13.bias"), r"lacks 1 tensors .*linear_heads\.13\.bias"),
        (lambda: state.update({"module.extra": torch.ones(1)}), r"has besides 1 tensors .*extra"),
        (
            lambda: state.update({"module.linear_heads.2.weight": torch.ones(4, 31)}),
            r"2\.weight is \(4, 31\).*\(4, 32\)",
        ),
        (lambda: saved.pop("model_state_dict"), "no 'model_state_dict'"),
    ):
        kept = dict(state)
        change()
        torch.save(saved, folder / "chexbert.pth")
        with pytest.raises(RewardError, match=message):
            load_chexbert(str(folder), None, "cpu")
        state.clear()
        state.update(kept)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_checkpoint_that_would_run_code_is_refused(copied):
    folder, _ = copied
    torch.save({"model_state_dict": Harmful()}, folder / "chexbert.pth")
    with pytest.raises(RewardError, match="no checkpoint of tensors"):
        load_reward("chexbert", {"model_folder": str(folder)}).setup()
