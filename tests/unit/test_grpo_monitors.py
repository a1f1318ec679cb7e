"""Monitors: what batches of samples look like, which limits they cross, and what follows."""

import json
import math
from types import SimpleNamespace

import pytest

from unirg.errors import UserError
from unirg.grpo.monitors import Limits, MonitorConfig, agreement, crossed, monitors, sample_metrics, signs
from unirg.recipe.schema import GrpoStage
from unirg.study import Study

ILL, NORMAL = "Small left effusion. No pneumothorax.", "No effusion."


def test_metrics_of_a_batch():
    metrics = sample_metrics([signs([ILL, ILL, NORMAL, ""], ILL), signs([NORMAL] * 4, NORMAL)], first_words=1.0)
    assert metrics == {
        "monitor/unique_outputs": pytest.approx((3 / 4 + 1 / 4) / 2),
        "monitor/all_normal": 6 / 8,
        "monitor/normal_excess": 6 / 8 - 1 / 2,
        "monitor/words": (5 + 5 + 2 + 0 + 8) / 8,
        "monitor/entities": (2 + 2 + 1 + 0 + 4) / 8,
        "monitor/length_drift": (5 + 5 + 2 + 0 + 8) / 8,
    }
    assert "monitor/length_drift" not in sample_metrics([signs([ILL], ILL)])


def test_agreement_is_within_studies():
    rewards = [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
    assert agreement(rewards, [[5.0, 6.0, 7.0], [-3.0, -2.0, -1.0]]) == pytest.approx(1)  # though it falls between them
    assert agreement(rewards, [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]) == pytest.approx(-1)
    assert agreement([[0.0, 1.0, math.nan, 9.0]], [[1.0, 2.0, 7.0, None]]) == pytest.approx(1)
    assert agreement([[1.0, 1.0]], [[1.0, 2.0]]) is None
    assert agreement([[1.0, 2.0]], [[None, None]]) is None


@pytest.mark.parametrize(
    ("limit", "metric", "fine", "beyond"),
    [
        ({"unique_outputs": 0.5}, "unique_outputs", (0.5, 1.0), (0.49,)),
        ({"normal_excess": 0.2}, "normal_excess", (0.2, -0.9), (0.21,)),
        ({"length_drift": 2.0}, "length_drift", (0.5, 1.0, 2.0), (0.49, 2.01)),
        ({"entities": 2.0}, "entities", (2.0, 7.0), (1.9,)),
        ({"agreement": 0.0}, "agreement/bleu", (0.0, 1.0), (-0.1,)),
    ],
)
def test_limits(limit, metric, fine, beyond):
    limits, name = Limits(**limit), f"monitor/{metric}"
    assert all(crossed({name: value}, limits) == {} for value in fine)
    assert all(list(crossed({name: value}, limits)) == [name] for value in beyond)
    assert crossed({name: beyond[0]}, Limits()) == {}
    assert crossed({}, limits) == {}


def group(*texts, reference=ILL, rewards=None, scores=None):
    samples = [SimpleNamespace(text=text) for text in texts]
    rewards = [0.0] * len(texts) if rewards is None else rewards
    return SimpleNamespace(study=Study("s", findings=reference), samples=samples, rewards=rewards, scores=scores or {})


@pytest.fixture
def work(tmp_path):
    """One rank of a stage, as far as monitors look at it."""

    def of(**config):
        rewards = [SimpleNamespace(weight=1.0, log_label="a"), SimpleNamespace(weight=0.0, log_label="held")]
        stage = SimpleNamespace(name="rl", monitors=MonitorConfig(**config), rewards=rewards)
        accelerator = SimpleNamespace(is_main_process=True)
        return SimpleNamespace(stage=stage, run=tmp_path, folder=tmp_path, accelerator=accelerator, everyones=list)

    return of


SCORES = {"a": [0.0, 0.0], "held": [0.0, 0.0]}


def test_drift_is_measured_against_the_first_batch_also_after_a_restart(work, tmp_path):
    watch = monitors(work())
    first = watch([group("one two", "one two three four", scores=SCORES)], 0)
    assert first["monitor/words"] == 3 and "monitor/length_drift" not in first
    assert watch([group("one " * 6, "one " * 6, scores=SCORES)], 1)["monitor/length_drift"] == 2
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **first}) + "\n" + json.dumps({"step": 2}) + "\n")
    assert monitors(work())([group("one", "one two", scores=SCORES)], 2)["monitor/length_drift"] == 0.5


def test_a_held_out_metric_is_compared_with_the_reward(work):
    scores = {"a": [0.0, 1.0], "held": [1.0, 0.0]}
    metrics = monitors(work())([group(ILL, NORMAL, rewards=[0.0, 1.0], scores=scores)], 0)
    assert metrics["monitor/agreement/held"] == pytest.approx(-1)
    assert "monitor/agreement/a" not in metrics
    assert "monitor/agreement/held" not in monitors(work())([group(ILL, NORMAL, scores=SCORES)], 0)


def test_a_warning_is_given_once_and_again_after_a_return(work, capsys):
    watch = monitors(work(warn={"unique_outputs": 0.9}))
    for batch, texts in enumerate([(ILL, NORMAL), (ILL, ILL), (ILL, ILL), (ILL, NORMAL), (ILL, ILL)]):
        watch([group(*texts, scores=SCORES)], batch)
    told = capsys.readouterr().out.splitlines()
    assert [line.split("rl  ")[1] for line in told] == [
        f"batch {n}: monitor/unique_outputs is 0.5, and should be at least 0.9" for n in (2, 5)
    ]


def test_a_stop_names_the_stage_the_figure_and_where_to_look(work, tmp_path):
    watch = monitors(work(stop={"normal_excess": 0.5, "entities": 0.5}))
    watch([group(ILL, NORMAL, scores=SCORES)], 0)
    with pytest.raises(
        UserError, match=r"stage rl, batch 2: .*normal_excess is 1, and .* at most 0.5; .*entities is 0,"
    ):
        watch([group("", "Chest", scores=SCORES)], 1)


def test_limits_outside_of_what_can_be_are_refused():
    for wrong in ({"unique_outputs": 2}, {"length_drift": 0.5}, {"entity": 1}):
        with pytest.raises(ValueError):
            MonitorConfig(warn=wrong)


def test_agreement_needs_a_held_out_metric():
    stage = {
        "name": "rl",
        "kind": "grpo",
        "steps": 1,
        "optimiser": {"learning_rate": 1e-4},
        "monitors": {"warn": {"agreement": 0.1}},
    }
    with pytest.raises(ValueError, match=r"stage 'rl': monitors.agreement needs a held-out metric"):
        GrpoStage(**stage, rewards=[{"name": "bleu"}])
    GrpoStage(**stage, rewards=[{"name": "bleu"}, {"name": "rouge_l", "weight": 0}])
