"""Length, repetition, sections and templates."""

import csv
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward

NORMAL = "The lungs are clear. Heart size is normal. No pneumothorax or pleural effusion."
OTHER = "There is a large left pleural effusion with compressive atelectasis."


def _score(name, text, **options):
    return load_reward(name, options).score([text], ["x"])[0]


# length_band


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0), (5, 0.5), (9, 0.9), (10, 1), (15, 1), (20, 1), (30, 0.5), (40, 0), (4000, 0)]
)
def test_length_band_is_full_inside_and_falls_on_both_sides(words, expected):
    assert _score("length_band", " ".join(["word"] * words), low=10, high=20) == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"low": 0, "high": 5}, {"low": 6, "high": 5}, {"low": -3, "high": -1}])
def test_an_impossible_band_is_named(options):
    with pytest.raises(ValueError, match="low"):
        _score("length_band", "word", **options)


def test_length_band_has_no_default():
    with pytest.raises(RewardError, match="'high'"):
        _score("length_band", "word", low=3)


# repetition


def test_a_report_without_repetition_is_whole():
    assert _score("repetition", NORMAL) == 1


def test_a_sentence_said_20_times_costs_nearly_all():
    assert _score("repetition", f"{OTHER} " * 20) == 1 / 20
    assert _score("repetition", "Normal. " * 20) == 1 / 20
    assert _score("repetition", "normal " * 43) == 1 / 40  # 40 four-grams, one of them new


def test_repetition_sees_through_case_and_punctuation():
    assert _score("repetition", "No effusion. NO EFFUSION! No  effusion\nno effusion") == 1 / 4


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([NORMAL, OTHER, "Rib fracture."]), min_size=1, max_size=5), st.integers(1, 6))
@example([NORMAL, *[OTHER] * 3, "Rib fracture."], 3)
def test_saying_it_again_never_pays(sentences, n):
    text = " ".join(sentences)
    assert _score("repetition", f"{text} {sentences[-1]}", n=n) <= _score("repetition", text, n=n)


def test_n_is_a_number_of_words():
    assert _score("repetition", "left left right", n=1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="n is 0"):
        _score("repetition", "left", n=0)


# sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Findings: Clear lungs. Impression: Normal.", 1),
        ("FINDINGS:\nClear lungs.\n\nIMPRESSION :\nNormal.", 1),
        ("Impression: Normal. Findings: Clear lungs.", 0),
        ("Findings: Clear lungs.", 0),
        ("Findings: Impression: Normal.", 0),
        ("Findings: Clear lungs. Impression:", 0),
        ("Findings: . Impression: Normal.", 0),
        ("Findings: Clear. Impression: Normal. Impression: Normal.", 0),
        ("Sure! Findings: Clear lungs. Impression: Normal.", 0),
        ("Findings Clear lungs. Impression Normal.", 0),
        ("Findings: Clear. Preimpression: Normal.", 0),
        ("", 0),
    ],
)
def test_sections_wants_every_header_once_in_order_with_content(text, expected):
    assert _score("sections", text) == expected


def test_sections_takes_other_headers():
    text = "Findings (chest): Clear. Findings: None. Plan: Rest."
    assert _score("sections", text, headers=["Findings (chest)", "Findings", "Plan"]) == 1
    assert _score("sections", text, headers=["Findings", "Plan"]) == 0
    for wrong in ([], ["Findings", "findings"]):
        with pytest.raises(ValueError, match="headers"):
            _score("sections", text, headers=wrong)


# template_duplicate


@pytest.fixture
def training(tmp_path):
    """Invented training reports: NORMAL three times, in other spellings, one report twice, one once."""
    reports = [NORMAL, NORMAL.upper(), f" {NORMAL} ", "No acute process.", "No acute process", OTHER]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": i, "report": text}) + "\n" for i, text in enumerate(reports)))
    return path


def test_a_template_scores_nothing_where_the_reference_is_another_report(training):
    reward = load_reward("template_duplicate", {"reports": str(training)})
    near = NORMAL.replace("or pleural", "or  PLEURAL").rstrip(".")
    candidates = [NORMAL, near, "No acute process.", OTHER, f"{NORMAL} {OTHER}", "", "?!"]
    assert reward.score(candidates, ["Right rib fracture."] * 7) == [0, 0, 0, 1, 1, 0, 0]
    assert reward.identity["templates"] == 2


def test_a_template_that_the_reference_is_itself_is_right(training):
    reward = load_reward("template_duplicate", {"reports": str(training)})
    assert reward.score([NORMAL, "No acute process.", NORMAL], [NORMAL, NORMAL, ""]) == [1, 0, 0]


def test_nearly_means_as_similar_as_asked(training):
    changed = NORMAL.replace("Heart size is normal", "Heart size is enlarged")
    for similarity, expected in ((0.7, 0), (0.9, 1)):
        options = {"reports": str(training), "similarity": similarity}
        assert load_reward("template_duplicate", options).score([changed], [OTHER]) == [expected]


def test_only_the_k_commonest_are_templates(training):
    reward = load_reward("template_duplicate", {"reports": str(training), "k": 1})
    assert reward.score([NORMAL, "No acute process."], [OTHER] * 2) == [0, 1]


def test_reports_are_read_from_csv_and_text_too(tmp_path):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [f"{NORMAL}\nNo fracture."], [f"{NORMAL}\nNo fracture."]])
    (tmp_path / "t.txt").write_text(f"{NORMAL}\n{OTHER}\n{NORMAL}\n")
    table = load_reward("template_duplicate", {"reports": str(tmp_path / "t.csv"), "column": "text"})
    assert table.score([f"{NORMAL} No fracture.", NORMAL + OTHER], [OTHER] * 2) == [0, 1]
    lines = load_reward("template_duplicate", {"reports": str(tmp_path / "t.txt")})
    assert lines.score([NORMAL, OTHER], [""] * 2) == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.jsonl", None, "absent.jsonl.*cannot be read"),
        ("t.parquet", "x", "expected a .jsonl, .csv or .txt"),
        ("t.jsonl", '{"report": "a"}\n{"text": "a"}\n', "report 2 has no text in 'report'"),
        ("t.jsonl", '{"report": "a"}\n{"report": 3}\n', "report 2"),
        ("t.jsonl", '{"report": \n', "cannot be read"),
        ("t.csv", "id,text\n1,a\n", "report 1"),
        ("t.txt", "one\ntwo\n", "no report occurs more than once"),
        ("t.txt", "\n\n", "no report occurs more than once"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RewardError, match=said):
        load_reward("template_duplicate", {"reports": str(tmp_path / name)}).setup()


@pytest.mark.parametrize("options", [{"k": 0}, {"similarity": 0}, {"similarity": 1.1}])
def test_wrong_options_are_named(training, options):
    with pytest.raises(RewardError, match="similarity"):
        load_reward("template_duplicate", {"reports": str(training)} | options)


# what all owe a policy


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_gets_a_number_between_0_and_1(texts):
    rewards = [
        load_reward("length_band", {"low": 3, "high": 9}),
        load_reward("repetition"),
        load_reward("sections"),
        _templates(),
    ]
    for reward in rewards:
        scores = reward.score([*texts, "", " \n"], ["x"] * (len(texts) + 2))
        assert all(0 <= score <= 1 for score in scores)
        assert scores[-2:] == [0, 0]


def _templates():
    reward = load_reward("template_duplicate", {"reports": "unread"})
    reward.written._templates = [frozenset({("", "a"), ("a", "")})]
    return reward
