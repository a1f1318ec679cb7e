"""A stage whose reports cannot be scored stops, keeps what it learnt, and goes on when its rewards are mended."""

from pathlib import Path

import pytest

from tests.unit.test_grpo_update import grpo_work
from unirg import run as run_folder
from unirg.errors import UserError
from unirg.grpo.loop import run_grpo
from unirg.policy import Policy
from unirg.rollout.hf import HFSampler
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study

REWARDS = """
import os

def length(candidates, references, **columns):
    return [float(len(text)) for text in candidates]

def dies(candidates, references, **columns):
    if not os.path.exists(os.path.join(os.path.dirname(__file__), "mended")):
        os._exit(7)
    return length(candidates, references)

def none(candidates, references, **columns):
    return [None] * len(candidates)

def later(candidates, references, **columns):
    seen = os.path.join(os.path.dirname(__file__), "seen")
    with open(seen, "a+") as file:
        file.write("x")
    return length(candidates, references) if os.path.getsize(seen) % 3 == 0 else [None] * len(candidates)
"""


def train(policy: Policy, studies: list[Study], folder: Path, *names: str, steps: int) -> list[dict[str, float]]:
    rewards = [RewardConfig(name=f"{folder}/own.py:{name}") for name in names]
    options = {"steps": steps, "studies_per_step": 2, "group_size": 2, "sampling": {"max_new_tokens": 4}}
    work = grpo_work(policy, folder, rewards=[reward.model_dump() for reward in rewards], **options)
    work.studies = studies
    with ScoringEngine(rewards, supervised=True) as engine:
        run_grpo(work, HFSampler(policy), engine, None, None)
    return run_folder.read_metrics(work.folder)


@pytest.mark.parametrize("names", [["dies"], ["length", "dies"]])
def test_a_stage_whose_reward_dies_stops_and_goes_on_when_it_is_mended(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path, names: list[str]
) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    for _ in range(2):  # started again with nothing mended, it does not train two batches more
        with pytest.raises(UserError, match="batch 3: dies failed on every report, 3 batches in a row; what is learnt"):
            train(tiny_policy, studies, tmp_path, *names, steps=5)
    assert [path.name for path in (tmp_path / "stages" / "g").glob("step-*")] == ["step-000002"]
    (tmp_path / "mended").touch()
    records = train(tiny_policy, studies, tmp_path, *names, steps=5)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["rewards/dies/failed"] for record in records] == [4, 4, 0, 0, 0]


def test_a_stage_that_can_score_nothing_stops(tiny_policy: Policy, studies: list[Study], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(REWARDS)
    with pytest.raises(UserError, match="batch 3: no report could be scored, 3 batches in a row"):
        train(tiny_policy, studies, tmp_path, "none", steps=5)


@pytest.mark.parametrize(("names", "masked"), [(["later"], [4, 4, 0, 4, 4, 0]), (["length", "none"], [0] * 4)])
def test_a_stage_goes_on_where_some_report_is_scored(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path, names: list[str], masked: list[int]
) -> None:
    """The second: a reward that cannot judge is not one that failed."""
    (tmp_path / "own.py").write_text(REWARDS)
    records = train(tiny_policy, studies, tmp_path, *names, steps=len(masked))
    assert [record["masked_samples"] for record in records] == masked
