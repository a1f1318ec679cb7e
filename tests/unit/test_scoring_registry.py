"""Three ways to name a reward, and what a wrong name is answered with."""

import sys
from pathlib import Path

import pytest

from unirg.scoring.contract import RewardError
from unirg.scoring.registry import installed, load_reward

FILE = '''
"""Loaded once."""
import dataclasses

@dataclasses.dataclass
class Kept:
    n: int

def short(candidates, references, limit=3, **columns):
    """Whether a report is short."""
    return [float(len(text.split()) <= limit) for text in candidates]

def by_label(candidates, references, labels):
    return [float(len(known)) for known in labels]

def wants(candidates, references, age):
    return age

ready = 3
'''


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


def test_a_function_of_a_file_with_its_options(own_file):
    assert load_reward(f"{own_file}:short", {"limit": 1}).score(["a", "a b"], ["", ""]) == [1.0, 0.0]


def test_a_dotted_name():
    assert load_reward("unirg_rewards.bleu:Bleu", {"variant": "coco1"}).score(["a b"], ["a b"])[0] == pytest.approx(1)


def test_a_file_is_executed_once(own_file):
    one, other = load_reward(f"{own_file}:short"), load_reward(f"{own_file}:by_label")
    assert one.written.__globals__ is other.written.__globals__


def test_a_function_without_columns_gets_those_it_names(own_file):
    reward = load_reward(f"{own_file}:by_label")
    assert reward.score(["x"], [""], labels=[{"effusion": 1}], patient=["p"]) == [1.0]


def test_an_option_stands_though_a_column_has_its_name(tmp_path):
    """Every study has a column `language`; a function's own `language` is what the recipe says."""
    path = tmp_path / "speaks.py"
    path.write_text("def speaks(candidates, references, *, language='en', **columns):\n    return [language == 'de']\n")
    assert load_reward(f"{path}:speaks", {"language": "de"}).score(["x"], ["y"], language=["en"]) == [1.0]


def test_a_missing_column_is_named(own_file):
    with pytest.raises(RewardError, match="needs 'age'"):
        load_reward(f"{own_file}:wants").score(["x"], [""], labels=[{}])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rouge", {}, "no reward 'rouge' .nearest: rouge_l"),
        ("bleu", {"varient": "coco4"}, "no option 'varient' .nearest: variant"),
        ("bleu", {"variant": "bleu9"}, "variant 'bleu9' is none of"),
        ("rouge_l", {"depth": 1}, "no option 'depth' .options: none"),
        ("no/such/file.py:f", {}, "there is no file /.*/no/such/file.py"),
        ("no/such/file.py", {}, "names a file; name its function too, as no/such/file.py:FUNCTION"),
        ("no.such.module:f", {}, "no.such.module cannot be imported"),
        ("unirg_rewards.bleu:Blue", {}, "has no 'Blue' .nearest: Bleu"),
        ("unirg_rewards.bleu:VARIANTS", {}, "is of type tuple, expected a function or a class"),
    ],
)
def test_a_wrong_name_or_option_is_told(name, options, said):
    with pytest.raises(RewardError, match=said):
        load_reward(name, options)


def test_a_misspelt_option_of_a_function_is_not_swallowed_by_its_columns(own_file):
    with pytest.raises(RewardError, match=r"no option 'limt' \(nearest: limit\)"):
        load_reward(f"{own_file}:short", {"limt": 1})


def test_a_file_that_fails_says_so_and_can_be_mended(tmp_path):
    path = tmp_path / "bad.py"
    for content, said in (
        ("1 / 0", r"ZeroDivisionError: .*bad\.py:1, in <module>"),
        ("import nothing_of_this_name", r"No module named 'nothing_of_this_name' \(\S*bad\.py:1, in <module>\)$"),
        ("open('gone.csv')", r"FileNotFoundError: .*'gone\.csv' \(\S*bad\.py:1, in <module>\)$"),
        ("def f(candidates, references\n", r"SyntaxError: '\(' was never closed \(bad\.py, line 1\)$"),
        ("def f(candidates):\n    return []", r"takes 1 positional arguments, expected \(candidates, references\)"),
        (
            "class f:\n    def __init__(self):\n        open('gone.pt')",
            r"cannot be built: FileNotFoundError: .*bad\.py:3",
        ),
    ):
        path.write_text(content)
        with pytest.raises(RewardError, match=said):
            load_reward(f"{path}:f")
        for name in [name for name in sys.modules if name.startswith("unirg_reward_bad_")]:
            del sys.modules[name]  # a file is executed once per process
    path.write_text("def f(candidates, references):\n    return [1.0 for _ in candidates]")
    assert load_reward(f"{path}:f").score(["x"], [""]) == [1.0]


def test_the_built_in_rewards_are_listed_with_what_they_measure():
    listed = {reward.name: reward for reward in installed()}
    for name in ("bleu", "rouge_l", "label_f1", "entity_f1", "ratescore"):
        assert listed[name].error is None
        assert listed[name].measures and listed[name].needs


def test_the_documented_example_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    (tmp_path / "my_rewards.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    reward = load_reward(f"{tmp_path}/my_rewards.py:names_a_side", {"worth": 0.5})
    labels = [{"effusion/left": 1}, {"effusion/left": 1}, {"effusion": 0}]
    assert reward.score(["Left effusion.", "Effusion.", "x"], [""] * 3, labels=labels) == [0.5, 0.0, None]
