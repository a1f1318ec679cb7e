"""Rollouts: scores come to the reports they are of, failures are counted, and what is kept."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tests.unit.test_grpo_update import grpo_work
from unirg.grpo import rollouts
from unirg.grpo.rollouts import Group, write_rollouts
from unirg.policy import Policy
from unirg.rollout import Sample
from unirg.rollout.hf import HFSampler
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study
from unirg.training import Stopwatch


def test_a_masked_report_has_no_reward_in_the_rollouts(tmp_path: Path) -> None:
    """One reward could judge it and one could not: the sum of what is left is not comparable with its group's."""
    prompt: Any = None
    samples = [Sample((5, 1), (-0.5, -0.1), text, False) for text in ("Clear.", "Effusion.")]
    scores: dict[str, list[float | None]] = {"bleu": [0.5, 0.25], "labels": [1.0, None]}
    group = Group(Study("a"), prompt, samples, scores, rewards=[1.5, float("nan")], advantages=[0.0, 0.0], trained=[0])
    write_rollouts(tmp_path / "g" / "step-000001.parquet", [group])
    rows = pyarrow.parquet.read_table(tmp_path / "g" / "step-000001.parquet").to_pylist()
    assert [row["reward"] for row in rows] == [1.5, None]
    assert [row["scores.bleu"] for row in rows] == [0.5, 0.25] and [row["scores.labels"] for row in rows] == [1.0, None]
    assert [row["trained"] for row in rows] == [True, False] and rows[1]["candidate"] == "Effusion."
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["step-000001.parquet"]


REWARDS = '''
def length(candidates, references, **columns):
    return [float(len(text)) for text in candidates]

def first_of_study(candidates, references, study_id, **columns):
    """The place of a report in its batch, less that of its study's first."""
    return [float(row - study_id.index(name)) for row, name in enumerate(study_id)]

first_of_study.deduplicate = False

def fails(candidates, references, **columns):
    raise ValueError("no")
'''


@pytest.mark.parametrize("names", [["length", "fails"], ["length", "first_of_study"]])
def test_scores_come_to_their_reports_however_these_were_submitted(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(rollouts, "AT_ONCE", 3)
    (tmp_path / "own.py").write_text(REWARDS)
    configs = [RewardConfig(name=f"{tmp_path}/own.py:{name}") for name in names]
    work = grpo_work(tiny_policy, tmp_path, group_size=5, sampling={"max_new_tokens": 24}, rewards=configs)
    tiny_policy.stop_ids = tuple(range(0, 400, 9))  # reports end at many lengths
    with ScoringEngine(configs, supervised=True) as engine:
        groups, submitted = rollouts.sample_groups(work, HFSampler(tiny_policy), engine, studies, Stopwatch(), 0)
        assert len(submitted) == (1 if engine.compares else 7)  # 20 reports
        rollouts.collect_scores(engine, submitted, Stopwatch())
        metrics, _ = rollouts.judge_rollouts(work, HFSampler(tiny_policy), engine, groups, 0, Stopwatch())
    assert len({len(sample.ids) for group in groups for sample in group.samples}) > 3
    for group, study in zip(groups, studies, strict=True):
        assert group.study is study
        assert group.scores["length"] == [len(sample.text) for sample in group.samples]
        assert group.scores.get("first_of_study", [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]
    assert metrics["rewards/length/failed"] == 0 and metrics.get("rewards/fails/failed", 20) == 20
