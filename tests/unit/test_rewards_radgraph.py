"""RadGraph F1: words, annotations of the official package, levels, edge cases."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.radgraph_archives import NER, write_archive
from unirg.scoring.registry import load_reward
from unirg_rewards import radgraph_model
from unirg_rewards.onednn_linear import OneDnnLinear, use_onednn
from unirg_rewards.radgraph_f1 import LEVELS, RadGraphF1, annotation_f1, bfloat16_disagreement
from unirg_rewards.radgraph_text import MODELS, split_words

REPORTS = [
    "No acute cardiopulmonary process.",
    "Small left pleural effusion with adjacent atelectasis; the heart is mildly enlarged.",
    "TUBE ends 3.5 cm above the carina (unchanged).",
    "There is severe edema of the right lower lobe, likely acute.\nLungs are clear.",
]
REFERENCES = [
    "No acute process.",
    "Small left pleural effusion with adjacent atelectasis; the heart is enlarged.",
    "Tube ends 3.5 cm above the carina.",
    "There is severe edema of the right lower lobe, likely acute.",
]
# What radgraph 0.1.18 with transformers 4.57.6 answered for `archives` below. Entities: first and last word, number of
# the label, relations and the number of their entity; scores: simple, partial, complete of each pair.
OFFICIAL = {
    "radgraph": (
        [
            "0-4 1",
            "3-7 1",
            "0-5 1 located_at>1 located_at>11 located_at>13 located_at>14; 1-4 1; 1-5 1; 1-6 1; 1-7 2; 1-8 1; 3-7 1; "
            "3-8 1; 4-8 1; 4-9 1; 4-11 1 located_at>1 located_at>11 located_at>13 located_at>14; 5-9 1; 5-10 1 "
            "located_at>1 located_at>11 located_at>13 located_at>14; 6-11 1 located_at>1 located_at>11 located_at>13 "
            "located_at>14",
            "0-5 1; 1-5 1; 1-6 1; 4-8 1; 5-9 1; 5-10 1 located_at>6 located_at>9 located_at>13 located_at>15; 5-12 1; "
            "6-11 1; 7-12 1 located_at>6 located_at>9 located_at>13 located_at>15; 8-12 1; 8-13 1; 10-14 1; 10-15 1 "
            "located_at>6 located_at>9 located_at>13 located_at>15; 11-15 1; 11-16 1 located_at>6 located_at>9 "
            "located_at>13 located_at>15; 12-16 1",
        ],
        [(0, 0, 0), (0, 0, 0), (2 / 19, 2 / 19, 4 / 33), (20 / 29, 18 / 29, 22 / 47)],
    ),
    "radgraph-xl": (
        [
            "0-4 1",
            "",
            "0-5 1; 1-4 1 modify>2; 1-5 1; 1-6 1; 1-7 2; 1-8 1; 3-7 1; 3-8 1; 4-8 1; 4-9 1; 4-11 1; 5-9 1; 5-10 1; "
            "6-11 1",
            "0-5 1; 1-5 1; 1-6 1; 4-8 1; 5-9 1; 5-10 1; 5-12 1; 6-11 1; 7-12 1; 8-12 1; 8-13 1; 10-14 1; 10-15 1; "
            "11-15 1; 11-16 1; 12-16 1",
        ],
        [(0, 0, 0), (0, 0, 0), (1 / 9, 1 / 9, 1 / 9), (5 / 7, 5 / 7, 5 / 7)],
    ),
    "modern-radgraph-xl": (
        [
            "0-2 1 suggestive_of>1 located_at>3; 0-3 1; 1-2 1 modify>1 modify>3; 1-3 1",
            "1-3 1 modify>1; 2-7 4; 3-4 2; 5-7 4; 10-12 1",
            "5-6 1; 5-11 2; 5-12 1",
            "3-5 4; 3-8 1 modify>2; 5-8 1; 6-8 1; 7-9 1",
        ],
        [(0, 0, 0), (4 / 9, 4 / 9, 4 / 11), (1 / 4, 1 / 4, 1 / 4), (1 / 4, 1 / 4, 1 / 4)],
    ),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Model -> the folder of its archive, whose encoder folds what is longer than 16 pieces."""
    bias = {"modern-radgraph-xl": -2.2}
    return {
        model: str(
            write_archive(
                tmp_path_factory.mktemp(model), model, max_length=16, ner_bias=bias.get(model, -1.35), relation_bias=0.5
            )
        )
        for model in MODELS
    }


@pytest.fixture
def xl(archives):
    return {"model_folder": archives["radgraph-xl"]}


def compact(annotation, model):
    """An annotation as OFFICIAL has it."""
    return "; ".join(
        f"{entity['start_ix']}-{entity['end_ix']} {NER[model].index(entity['label'])}"
        + "".join(f" {relation}>{number}" for relation, number in entity["relations"])
        for entity in annotation.values()
    )


def reference_file(name):
    if "UNIRG_REFERENCE" not in os.environ:
        pytest.skip("UNIRG_REFERENCE (the reference data) is not set")
    return Path(os.environ["UNIRG_REFERENCE"]) / "radgraph" / name


@pytest.mark.parametrize("model", MODELS)
def test_annotations_and_scores_are_the_official_packages(archives, model):
    annotations, scores = OFFICIAL[model]
    reward = RadGraphF1(model=model, model_folder=archives[model])
    assert [compact(each, model) for each in reward.annotate(REPORTS)] == annotations
    for index, level in enumerate(LEVELS[:3]):
        reward = RadGraphF1(level, model, archives[model], case="pypi")
        assert reward.score(REPORTS, REFERENCES) == pytest.approx([triple[index] for triple in scores], abs=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_an_annotation_does_not_depend_on_the_batch(archives, model):
    reports = [*REPORTS, *REFERENCES, "no", " ".join(REPORTS) * 6]
    together = RadGraphF1(model=model, model_folder=archives[model]).annotate(reports)
    for report, expected in zip(reports, together):
        radgraph_model.load_radgraph.cache_clear()  # and with it the annotations
        assert RadGraphF1(model=model, model_folder=archives[model]).annotate([report]) == [expected]


@pytest.mark.parametrize(
    ("report", "first", "later"),
    [
        ("No effusion.", "No effusion .", "No effusion ."),
        ("Tube 3.5cm (left/right)", "Tube 3 . 5cm ( left / right )", "Tube 3 . 5cm ( left / right )"),
        ("non-focal", "non-focal", "non - focal"),
        ("(50%). ok", "( 50% ) . ok", "( 50 % ) . ok"),
        ("is it?' /. ", "is it ? ' / .", "is it ?' /."),
        ('a\\nb c\\f \\u2122d \\"e\\"', 'a\\nb c\\f \\u2122d \\"e\\"', "a b c d `` e ``"),
        ("a;b\n\nc", "a;b c", "a ; b c"),
        (" \n", "", ""),
    ],
)
def test_words(report, first, later):
    assert " ".join(split_words(report, "radgraph")) == first
    assert " ".join(split_words(report, "radgraph-xl")) == later
    assert split_words(report, "modern-radgraph-xl") == split_words(report, "radgraph-xl")


def test_words_of_published_annotations():
    recorded = json.loads(reference_file("expected_processed_annotations.json").read_text())
    assert len(recorded) == 5
    for report in recorded:
        official = report["processed_annotations"]["radgraph_annotations"]["0"]
        words = split_words(report["report_text"], "radgraph-xl")
        assert " ".join(words) == official["text"]
        for entity in official["entities"].values():
            assert " ".join(words[entity["start_ix"] : entity["end_ix"] + 1]) == entity["tokens"]


def test_levels_on_published_annotations():
    recorded = json.loads(reference_file("expected_processed_annotations.json").read_text())
    entities = [report["processed_annotations"]["radgraph_annotations"]["0"]["entities"] for report in recorded]
    for one in entities:
        assert [annotation_f1(one, one, level) for level in LEVELS[:3]] == [1, 1, 1]
        for other in entities:
            sets = [{(each["tokens"].lower(), each["label"]) for each in side.values()} for side in (one, other)]
            precision, recall = (len(sets[0] & sets[1]) / len(side) for side in sets)
            expected = 2 * precision * recall / (precision + recall) if precision else 0
            assert annotation_f1(one, other, "simple") == pytest.approx(expected)


def test_levels_differ_in_what_a_relation_adds():
    reference = {
        "1": {"tokens": "Tube", "label": "OBS-DP", "relations": []},
        "2": {"tokens": "opacities", "label": "OBS-DP", "relations": [["suggestive_of", "4"], ["located_at", "3"]]},
        "3": {"tokens": "bibasilar", "label": "ANAT-DP", "relations": []},
        "4": {"tokens": "atelectasis", "label": "OBS-U", "relations": []},
    }
    candidate = {
        "1": {"tokens": "tube", "label": "OBS-DP", "relations": []},
        "2": {"tokens": "Opacities", "label": "OBS-DP", "relations": [["located_at", "3"]]},
        "3": {"tokens": "Bibasilar", "label": "ANAT-DP", "relations": []},
        "4": {"tokens": "atelectasis", "label": "OBS-DP", "relations": [["located_at", "3"]]},
    }
    lower = [annotation_f1(candidate, reference, level) for level in LEVELS]
    assert lower == pytest.approx([2 * 3 / 8, 2 * 3 / 8, 2 * 3 / 9, (2 * 3 / 8 + 2 * 1 / 4) / 2])
    # The release compares capitals, but for a relation's words: only that one item is left.
    pypi = [annotation_f1(candidate, reference, level, "pypi") for level in LEVELS]
    assert pypi == pytest.approx([0, 0, 2 * 1 / 9, 0])
    assert annotation_f1({}, {}, "simple") == 0
    alone = {"1": reference["1"]}
    assert [annotation_f1(alone, alone, level) for level in LEVELS] == [1, 1, 1, 0.5]
    target = {"1": {"tokens": "Tube", "label": "OBS-U", "relations": []}, "2": candidate["2"] | {"relations": []}}
    assert annotation_f1(target, {}, "combined") == 0


def test_blank_reports_never_reach_the_model(xl, monkeypatch):
    reward = load_reward("radgraph_f1", xl)
    reward.setup()
    monkeypatch.setattr(reward.written._radgraph, "_encode", lambda batch: pytest.fail(f"shown {batch[0].words}"))
    blank = ["", " ", "\n\t", "\u2003", "\\n"]
    assert reward.score(blank, blank) == [None, None, None, None, 0]
    assert reward.written.values(blank, blank) == [0] * 5
    # A character that the tokenizer drops is a word without a piece.
    assert reward.score(["\u200b"], ["\u200b\u200d"]) == [0]


def test_a_text_is_read_once_however_often_it_comes(xl, monkeypatch):
    radgraph_model.load_radgraph.cache_clear()
    reward = load_reward("radgraph_f1", xl)
    reward.setup()
    seen, encode = [], reward.written._radgraph._encode
    record = lambda batch: (seen.extend(report.words for report in batch), encode(batch))[1]  # noqa: E731
    monkeypatch.setattr(reward.written._radgraph, "_encode", record)
    candidates = [REPORTS[0], REPORTS[1], REPORTS[0], "No acute  cardiopulmonary\nprocess ."]
    reward.score(candidates, [REFERENCES[0]] * 4)
    assert len(seen) == len(set(seen)) == 3
    other = load_reward("radgraph_f1", xl | {"level": "complete"})
    other.score(candidates, [REFERENCES[0]] * 4)
    assert len(seen) == 3
    assert other.written.shares == reward.written.shares


def test_annotations_kept_are_bounded(xl, monkeypatch):
    monkeypatch.setattr(radgraph_model, "CACHED", 3)
    reward = load_reward("radgraph_f1", xl)
    first = reward.score(REPORTS, REFERENCES)
    assert len(reward.written._radgraph._annotations) == 3
    assert reward.score(REPORTS, REFERENCES) == first


def test_long_reports_are_cut_and_the_identity_says_so(xl):
    long = REPORTS[3] * 40
    cut = RadGraphF1(max_words=20, **xl)
    assert cut.identity["max_words"] == 20
    whole = RadGraphF1(**xl).annotate([" ".join(split_words(long, "radgraph-xl")[:20])])
    assert cut.annotate([long]) == whole
    assert max(entity["end_ix"] for entity in whole[0].values()) == 19


def test_identity_names_variant_and_weights(archives):
    one, other = (load_reward("radgraph_f1", {"model": name, "model_folder": archives[name]}) for name in MODELS[:2])
    assert "weights" not in one.identity
    one.setup()
    other.setup()
    assert one.identity["weights"] != other.identity["weights"]
    expected = {"level": "partial", "model": "radgraph", "case": "lower", "max_words": 512, "precision": "float32"}
    assert expected.items() <= one.identity.items()
    json.dumps(one.identity)


def test_entity_f1s_backend_is_this_reward(xl):
    backend = load_reward("entity_f1", {"backend": "radgraph", "level": "complete", **xl})
    backend.setup()
    assert backend.score(REPORTS, REFERENCES) == RadGraphF1("complete", **xl).score(REPORTS, REFERENCES)
    assert backend.identity["backend"] == "radgraph"
    assert backend.identity["weights"]


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(*[st.one_of(st.text(max_size=60), st.sampled_from([*REPORTS, "no", "\x00", "🫁 🫁", "[SEP]"]))] * 2),
        max_size=5,
    ),
    model=st.sampled_from(MODELS),
    level=st.sampled_from(LEVELS),
)
def test_any_text_gets_a_number_between_0_and_1_or_none(archives, pairs, model, level):
    reward = load_reward("radgraph_f1", {"level": level, "model": model, "model_folder": archives[model]})
    candidates, references = (list(side) for side in zip(*pairs)) if pairs else ([], [])
    scores = reward.score(candidates, references)
    assert [score is None for score in scores] == [not reference.strip() for reference in references]
    assert all(score is None or 0 <= score <= 1 for score in scores)
    assert reward.written.values(candidates, references) == reward.written.values(references, candidates)
    entities = [bool(annotation) for annotation in reward.written.annotate(references)]
    if level != "combined":
        assert reward.written.values(references, references) == entities


def test_bfloat16s_disagreement_is_measured(xl):
    reports = [f"{one} {other}" for one in REPORTS for other in REFERENCES]
    figures = bfloat16_disagreement(reports, **xl)
    assert 0 < figures["reports"] <= 1
    assert all(0.5 < figures[level] < 1 for level in ("simple", "partial", "complete"))


def test_loading_leaves_the_runs_random_numbers_alone(xl):
    radgraph_model.load_radgraph.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    load_reward("radgraph_f1", xl).setup()
    assert torch.equal(torch.rand(2), expected)


def test_onednn_layers_give_the_same_product():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)))
    x = torch.randn(2, 4, 7)
    with torch.inference_mode():
        expected = model(x)
        fast = use_onednn(model)
        assert isinstance(fast[0], OneDnnLinear) and isinstance(fast[1][0], OneDnnLinear)
        torch.testing.assert_close(fast(x), expected)
    half = use_onednn(torch.nn.Sequential(torch.nn.Linear(3, 3).bfloat16()))
    assert type(half[0]) is torch.nn.Linear


@pytest.mark.parametrize("option", [{"level": "full"}, {"model": "echograph"}, {"case": "upper"}, {"max_words": 0}])
def test_a_wrong_option_is_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        RadGraphF1(**option)
