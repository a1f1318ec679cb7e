"""Three ways to name a reward, and what a wrong name is answered with."""

import subprocess
import sys
from pathlib import Path

import pytest

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import installed, load_reward
from unirg.study import Study

PLUGIN = Path(__file__).parents[1] / "plugin_package"

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
        ("no/such/file.py:f", {}, "cannot be imported .FileNotFoundError"),
        ("no.such.module:f", {}, "no.such.module cannot be imported"),
        ("unirg_rewards.bleu:Blue", {}, "has no 'Blue' .nearest: Bleu"),
        ("unirg_rewards.bleu:VARIANTS", {}, "is a tuple, expected a function or a class"),
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
    path.write_text("1 / 0")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        load_reward(f"{path}:f")
    path.write_text("def f(candidates, references):\n    return [1.0 for _ in candidates]")
    assert load_reward(f"{path}:f").score(["x"], [""]) == [1.0]


def test_the_built_in_rewards_are_listed_with_what_they_measure():
    listed = {reward.name: reward for reward in installed()}
    for name in ("bleu", "rouge_l", "label_f1", "entity_f1", "ratescore"):
        assert listed[name].error is None
        assert listed[name].measures and listed[name].needs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The third-party package of tests/plugin_package, installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in PLUGIN.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def test_a_third_partys_package_is_found(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    configs = [
        RewardConfig(name="words_near", options={"tolerance": 0}),
        RewardConfig(name="says_side", label="side"),
    ]
    engine = ScoringEngine(configs)
    studies = [Study(id="a", labels={"effusion/left": 1}), Study(id="b")]
    batch = ScoreBatch(["left effusion", "x"], ["left effusion", ""], study_columns(studies))
    assert engine.collect(engine.submit(batch)) == {"words_near": [1.0, None], "side": [1.0, None]}


def test_a_broken_plug_in_is_listed_and_hides_nothing(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    listed = {reward.name: reward for reward in installed()}
    assert "ModuleNotFoundError" in listed["broken_example"].error
    assert listed["words_near"].package == "example-report-rewards"
    assert listed["words_near"].measures == "Whether the report has about as many words as the reference."
    assert listed["bleu"].error is None
    with pytest.raises(RewardError, match=r"'broken_example'.*cannot be loaded: ModuleNotFoundError"):
        load_reward("broken_example")


def test_the_documented_example_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    (tmp_path / "my_rewards.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    reward = load_reward(f"{tmp_path}/my_rewards.py:names_a_side", {"worth": 0.5})
    labels = [{"effusion/left": 1}, {"effusion/left": 1}, {"effusion": 0}]
    assert reward.score(["Left effusion.", "Effusion.", "x"], [""] * 3, labels=labels) == [0.5, 0.0, None]
