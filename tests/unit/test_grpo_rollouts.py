"""What GRPO keeps of its rollouts."""

from pathlib import Path
from typing import Any

import pyarrow.parquet

from unirg.grpo.rollouts import Group, write_rollouts
from unirg.rollout import Sample
from unirg.study import Study


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
