"""BERTScore and the batches of the text encoders, on a tiny RoBERTa folder with random weights."""

import json
import math

import pytest
import torch

from tests.encoders import ODD, REPORTS, roberta_folder
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward
from unirg_rewards.bertscore import greedy_f1, read_baseline
from unirg_rewards.text_encoder import Encoder, Recent, batch_rows, load_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return roberta_folder(tmp_path_factory.mktemp("models") / "roberta")


@pytest.fixture
def options(folder):
    return {"model": "tiny", "model_folder": str(folder), "layer": 2, "baseline": str(folder / "baseline.tsv")}


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": str(n), "report": text}) + "\n" for n, text in enumerate(REPORTS)))
    return file


def unit(*angles):
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in angles])


def test_every_token_takes_its_most_similar_one():
    equal = torch.tensor([0.5, 0.5])
    # candidate at 0 and 90 degrees, reference at 0 and 60: the best cosines are 1 and cos 30, and 1 and cos 30
    value = greedy_f1(unit(0, 90), equal, unit(0, 60), equal).item()
    assert value == pytest.approx((1 + math.cos(math.pi / 6)) / 2, abs=1e-6)


def test_precision_weighs_the_candidates_tokens_and_recall_the_references():
    value = greedy_f1(unit(0, 90), torch.tensor([0.8, 0.2]), unit(0), torch.tensor([1.0])).item()
    assert value == pytest.approx(2 * 0.8 * 1 / (0.8 + 1), abs=1e-6)


def test_a_token_without_weight_may_still_be_matched():
    # as upstream: [CLS] and [SEP] do not count, and what resembles them finds them
    value = greedy_f1(unit(0), torch.tensor([1.0]), unit(0, 90), torch.tensor([0.0, 1.0])).item()
    assert value == pytest.approx(0, abs=1e-6)  # recall: the one token that counts has cosine 0
    value = greedy_f1(unit(90), torch.tensor([1.0]), unit(90, 45), torch.tensor([0.0, 1.0])).item()
    assert value == pytest.approx(2 * math.cos(math.pi / 4) / (1 + math.cos(math.pi / 4)), abs=1e-6)


def test_opposite_vectors_give_0_and_never_an_infinite_score():
    assert greedy_f1(unit(0), torch.ones(1), unit(180), torch.ones(1)).item() == 0


def test_rescaling_moves_the_baseline_to_0_and_keeps_1(options):
    plain = load_reward(
        "bertscore", {key: options[key] for key in ("model", "model_folder", "layer")} | {"rescale": False}
    )
    raw = plain.score(REPORTS[1:], REPORTS[:-1])
    scaled = load_reward("bertscore", options).score(REPORTS[1:], REPORTS[:-1])
    assert scaled == pytest.approx([(value - 0.32) / 0.68 for value in raw], abs=1e-6)
    assert load_reward("bertscore", options).score(REPORTS, REPORTS) == pytest.approx([1] * len(REPORTS), abs=1e-6)


def test_silence_scores_the_least_there_is(options):
    # "\u200d" and blanks: what has no token is silence too; raw 0 would be -0.47 here and -5.55 for distilroberta
    candidates, references = ["", " \n\t", REPORTS[0], ""], [*REPORTS[:2], " ", ""]
    assert load_reward("bertscore", options).score(candidates, references) == [-1, -1, None, None]
    plain = {key: options[key] for key in ("model", "model_folder", "layer")} | {"rescale": False}
    assert load_reward("bertscore", plain).score(candidates, references) == [0, 0, None, None]


def test_official_edges_give_the_packages_value(options):
    candidates, references = ["", REPORTS[0], " ", REPORTS[0]], [REPORTS[0], " ", "", REPORTS[1]]
    reward = load_reward("bertscore", options | {"official_edges": True})
    scores = reward.score(candidates, references)
    assert scores[:3] == pytest.approx([-0.32 / 0.68] * 3)  # raw 0, rescaled with the baseline .32
    alone = load_reward("bertscore", options).score(candidates[3:], references[3:])
    assert scores[3:] == pytest.approx(alone, abs=1e-6)  # in another forward: rounding
    assert reward.identity["empty candidate"] == scores[0]
    # of the model that RadCliQ takes: what the package and its users print
    official = load_reward("bertscore", {"official_edges": True}).identity["empty candidate"]
    assert official == pytest.approx(-5.55, abs=0.001)


def test_no_rescaled_score_is_lower_than_silence(options, tmp_path):
    steep = tmp_path / "steep.tsv"
    steep.write_text("LAYER,P,R,F\n2,0.99,0.99,0.99\n")
    scores = load_reward("bertscore", options | {"baseline": str(steep)}).score(
        [*ODD, REPORTS[0]], [REPORTS[0]] * (len(ODD) + 1)
    )
    assert min(scores) == -1
    assert scores[-1] == pytest.approx(1, abs=1e-4)  # rounding, a hundredfold


def test_idf_comes_from_the_corpus_and_not_from_the_batch(options, corpus):
    plain, weighted = load_reward("bertscore", options), load_reward("bertscore", options | {"idf_corpus": str(corpus)})
    pair = ["Mild cardiomegaly."], ["No acute cardiopulmonary process."]
    alone = weighted.score(*pair)
    assert abs(alone[0] - plain.score(*pair)[0]) > 1e-3
    weighted = load_reward("bertscore", options | {"idf_corpus": str(corpus)})
    many = weighted.score([*pair[0], *ODD], [*pair[1], *ODD])
    assert many[0] == pytest.approx(alone[0], abs=1e-6)
    assert weighted.score([REPORTS[0]], [REPORTS[0]]) == [pytest.approx(1, abs=1e-6)]  # one reference: not log(1) = 0


def test_idf_is_the_packages_formula(options, corpus):
    reward = load_reward("bertscore", options | {"idf_corpus": str(corpus)})
    reward.setup()
    tokenizer = reward.written._encoder.tokenizer
    # log((N + 1) / (df + 1)) of 7 reports, a token that stands twice in one counted once
    for token in tokenizer(" Small left effusion. No", add_special_tokens=False)["input_ids"]:
        holding = sum(token in tokenizer(" " + report)["input_ids"] for report in REPORTS)
        assert reward.written._weight(token) == pytest.approx(math.log(8 / (holding + 1)))
    assert reward.written._weight(tokenizer.cls_token_id) == 0
    assert reward.written._weight(tokenizer.mask_token_id) == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("line", "message"),
    [("not json", "2: is not JSON"), ('{"text": "x"}', "2: .*'report'"), ('{"report": " "}', "holds 1 reports")],
)
def test_a_corpus_that_cannot_be_used_is_named(options, tmp_path, line, message):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"report": "Lungs are clear."}\n' + line + "\n")
    with pytest.raises(RewardError, match=f"corpus .*corpus.jsonl:? ?{message}"):
        load_reward("bertscore", options | {"idf_corpus": str(file)}).setup()


def test_layer_and_baseline_are_known_for_named_models_and_asked_for_otherwise(folder):
    assert load_reward("bertscore").identity["baseline"] == 0.8473319
    assert load_reward("bertscore").identity["layer"] == 5
    assert load_reward("bertscore", {"model": "roberta-large"}).identity["layer"] == 17
    for options, message in (
        ({"model": "roberta-huge"}, "`layer`"),
        ({"model": "roberta-huge", "layer": 3}, "`baseline`, or set rescale: false"),
        ({"layer": 4}, "no baseline is known for layer 4"),  # distilroberta's 5th layer has another baseline
        ({"layer": 9, "baseline": str(folder / "baseline.tsv")}, "has no layer 9"),
        ({"layer": 1, "baseline": "/no/file.tsv"}, "/no/file.tsv cannot be read"),
        ({"layer": 0}, "no baseline is known for layer 0"),
        ({"rescale": False, "baseline": str(folder / "baseline.tsv")}, "rescale is false"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward("bertscore", options)


def test_the_baseline_is_the_f1_column(folder, tmp_path):
    assert [read_baseline(str(folder / "baseline.tsv"), layer) for layer in (0, 3)] == [0.30, 0.33]
    (tmp_path / "odd.tsv").write_text("LAYER,P,R,F\n1,0.5\n")
    with pytest.raises(RewardError, match=r"odd\.tsv:2: expected LAYER,P,R,F"):
        read_baseline(str(tmp_path / "odd.tsv"), 1)


def test_the_layer_is_the_models_hidden_state_of_that_number(folder):
    from transformers import AutoModel

    encoder = load_encoder(str(folder), 2, "cpu")
    ids = encoder.tokenizer(REPORTS[0])["input_ids"]
    whole = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
    [(_, found)] = encoder.batches([ids])
    assert torch.allclose(found, expected, atol=1e-5)


def test_distilbert_is_cut_at_the_layer_too(tmp_path):
    # RadEval's bertscore is distilbert's; its configuration and its layers have other names
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlungs\nare\nclear\n.\n")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    whole = DistilBertModel(DistilBertConfig(vocab_size=9, n_layers=3, dim=32, n_heads=2, hidden_dim=32)).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), 2, "cpu")
    ids = tokenizer("Lungs are clear.")["input_ids"]
    with torch.no_grad():
        expected = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
    [(_, found)] = encoder.batches([ids])
    assert torch.allclose(found, expected, atol=1e-5)
    assert encoder.limit == 512


def test_an_encoder_that_cannot_be_used_is_named(folder, tmp_path):
    with pytest.raises(RewardError, match=r"has 3 layers; expected a layer from 1 to 3"):
        load_encoder(str(folder), 4, "cpu")
    with pytest.raises(RewardError, match=r"no/such/folder cannot be loaded.*hf download"):
        load_encoder("/no/such/folder", 1, "cpu")
    from safetensors.torch import load_file, save_file

    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (spoilt / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop("encoder.layer.0.output.dense.bias")
    save_file(state, spoilt / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights.*layer\.0\.output\.dense\.bias"):
        load_encoder(str(spoilt), 2, "cpu")


def test_a_long_report_is_cut_at_the_models_limit(options):
    reward = load_reward("bertscore", options)
    long = "effusion " * 5000
    assert reward.score([long], [REPORTS[0]]) == reward.score([long + "edema"], [REPORTS[0]])
    [ids] = reward.written._tokens([long])
    assert len(ids) == 128


def test_the_identity_says_which_bertscore_it_is(options, corpus):
    reward = load_reward("bertscore", options | {"idf_corpus": str(corpus)})
    reward.setup()
    identity = json.loads(json.dumps(reward.identity))
    assert {key: identity[key] for key in ("model", "layer", "baseline", "idf", "empty candidate")} == {
        "model": "tiny",
        "layer": 2,
        "baseline": 0.32,
        "idf": True,
        "empty candidate": -1,
    }
    assert len(identity["weights"]) == len(identity["idf corpus"]) == 16
    assert not load_reward("bertscore", options).identity["idf"]


def test_a_reference_is_encoded_once_and_a_known_pair_not_again(options, monkeypatch):
    encoded = []
    batches = Encoder.batches
    monkeypatch.setattr(Encoder, "batches", lambda self, ids: encoded.extend(ids) or batches(self, ids))
    reward = load_reward("bertscore", options)
    candidates = [*REPORTS[:4], REPORTS[0]]
    first = reward.score(candidates, [REPORTS[5]] * 5)
    assert len(encoded) == 5
    assert reward.score(candidates[::-1], [REPORTS[5]] * 5) == first[::-1]
    assert len(encoded) == 5


def test_forwards_keep_within_the_budget_and_leave_nobody_out():
    lengths = [3, 90, 7, 7, 41, 200, 1, 0, 12]
    forwards = list(batch_rows(lengths, 100))
    assert sorted(row for rows in forwards for row in rows) == list(range(len(lengths)))
    for rows in forwards:
        assert len(rows) * max(lengths[row] for row in rows) <= 100 or len(rows) == 1
    assert forwards[0] == [5]
    assert len(forwards) < len(lengths)
    assert list(batch_rows([], 100)) == []


def test_recent_keeps_what_was_used_last():
    asked = []

    def compute(keys):
        asked.extend(keys)
        return [key.upper() for key in keys]

    recent = Recent(2)
    assert recent.look_up(["a", "b", "a"], compute) == {"a": "A", "b": "B"}
    recent.look_up(["a"], compute)
    assert recent.look_up(["c"], compute) == {"c": "C"}  # "b" was used longest ago
    recent.look_up(["a", "b"], compute)
    assert asked == ["a", "b", "c", "b"]
    assert recent.look_up(["d", "e", "f"], compute) == {"d": "D", "e": "E", "f": "F"}  # more than are kept
