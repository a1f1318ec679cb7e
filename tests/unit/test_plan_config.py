"""A plan for published sizes: what is counted is what a model's card and its formulas say."""

import json
from pathlib import Path

import pytest

from unirg import cli
from unirg.plan.policy import Given, parameters, plan_policy
from unirg.recipe.load import load_recipe

CONFIG = Path(__file__).parents[2] / "docs" / "configs" / "qwen3-vl-8b.json"
TEXT = """
name: published
data: {adapter: jsonl, files: {train: train.jsonl}}
policy: {model: Qwen/Qwen3-VL-8B-Instruct}
stages: [{name: sft, kind: sft, steps: 1, studies_per_step: 8, optimiser: {learning_rate: 1.0e-3}}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    return file


def test_a_config_with_a_wrong_value_is_told(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    published = json.loads(CONFIG.read_text())
    published["text_config"]["hidden_size"] = "big"
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert cli.main(["plan", str(path), "--config", str(tmp_path / "config.json")]) == 2
    said = capsys.readouterr().err
    assert "no model configuration could be read" in said and "hidden_size" in said


def test_a_film_smaller_than_a_token_still_makes_one(path: Path) -> None:
    recipe = load_recipe(path, ["policy.image_size=20"])
    _, lengths = plan_policy(recipe, CONFIG, Given(text=100, films=2))
    assert len(lengths.prompt) == 100 + 2 * (1 + 2)


def test_the_published_sizes_give_the_published_count(path: Path) -> None:
    """Qwen3-VL-8B's card says 8.77 billion; lengths are assumed where there is no tokenizer."""
    recipe = load_recipe(path, ["policy.image_size=512"])
    policy, lengths = plan_policy(recipe, CONFIG, Given(text=100, films=2))
    counts = parameters(policy)
    assert round(sum(counts.values()) / 1e9, 2) == 8.77
    # By hand. A layer: queries and output of 32 heads, keys and values of 8, three matrices of the MLP, four norms.
    assert counts["head"] == counts["embeddings"] == 151_936 * 4096
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    assert counts["language layers"] == 36 * layer + 4096
    # A block: attention, MLP and two norms, with biases; a merger of four tokens, and three more for deep layers.
    block = 1152 * (4 * 1152 + 4) + 1152 * 2 * 4304 + 4304 + 1152 + 4 * 1152
    merger = 4608 * 4608 + 4608 + 4608 * 4096 + 4096
    start = 1152 * (3 * 2 * 16 * 16 + 1 + 2304)
    assert counts["vision tower"] == start + 27 * block + 4 * merger + 2 * (1152 + 3 * 4608)
    assert len(lengths.prompt) == 100 + 2 * (16 * 16 + 2)
