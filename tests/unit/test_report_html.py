"""The report page: model output is escaped, nothing comes from outside, missing and broken pieces are named."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unirg.errors import UserError
from unirg.evaluation.arms import evaluate_arms
from unirg.evaluation.evaluate import Arm, EvaluationConfig
from unirg.evaluation.table import DRAWN_FILMS
from unirg.report import build, write_samples
from unirg.study import Study, StudyImage

ATTACK = "<script>alert('report')</script><img src=https://example.org/x.png onerror=alert(1)> {{ 7 * 7 }} No effusion."
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """What a browser would make of the page: tags, their attributes, the text, and whether tags nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with every piece, and hostile text in each place where text can come in."""
    folder = tmp_path / "run"
    film = StudyImage(np.full((64, 48), 90, dtype=np.uint8))
    studies = [
        Study(
            f"s{i}<b>",
            images=(film,),
            findings="Left pleural effusion." if i % 2 else "No effusion.",
            labels={"effusion": i % 2, "effusion/left": i % 2},
            extra={"complete": "Findings: " + ("Left pleural effusion." if i % 2 else "No effusion."), "film": "drawn"},
        )
        for i in range(12)
    ]
    reports = {study.id: ATTACK for study in studies}
    copied = {study.id: study.extra["complete"] for study in studies}
    arms = {"sft<i>": Arm(reports, sees=ATTACK, seconds=65.0), "grpo": Arm(copied, sampled=reports)}
    config = EvaluationConfig(baseline="sft<i>", draws=20)
    evaluation = evaluate_arms(studies, arms, config, split="test", constants={config.headline: ATTACK})
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "test.json").write_text(json.dumps(evaluation))
    write_samples(folder, studies, {name: arm.reports for name, arm in arms.items()}, split="test", count=3)
    steps: list[dict[str, Any]] = [
        {"stage": "sft<i>", "step": s, "loss": 1 / s, "label $x$": 1, "eval/positive_f1": float("nan")}
        for s in range(1, 30)
    ]
    steps += [{"stage": "grpo", "step": s, "reward": s / 9, "rewards/bleu & co/mean": 0.1} for s in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"stage": "gr')
    rows = [
        {
            "study_id": f"s{i // 12}<b>",
            "candidate": f"{ATTACK} {i}",
            "advantage": float(i % 3 - 1),
            "reward": float("nan") if i == 5 else float(i),
            "scores.bleu": None if i == 5 else 0.25,
            "truncated": i == 0,
        }
        for i in range(36)
    ]
    (folder / "rollouts" / "grpo").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:3]), folder / "rollouts" / "grpo" / "step-000009.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / "grpo" / "step-000010.parquet")
    (folder / "manifest.json").write_text(json.dumps({"versions": {"torch": "2.0 <b>"}, "stages": {}}))
    (folder / "recipe.yaml").write_text(f"name: hostile\nnote: {json.dumps(ATTACK)}\n")
    return folder


def test_reports_and_names_are_escaped_everywhere(run: Path) -> None:
    page = read(build(run))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "i" not in [tag for tag, attrs in page.tags if not attrs.get("style")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count("<script>alert('report')</script>") >= 10  # shown as text: arms, samples, rollouts, recipe
    assert "{{ 7 * 7 }}" in page.text and "49 No effusion" not in page.text


def test_page_refers_to_nothing_outside_itself(run: Path) -> None:
    page = read(build(run))
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert addresses and all(value and value.startswith(("data:image/", "#")) for value in addresses)
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in str(policy[0])
    assert not re.findall(r"url\(|@import", (run / "report.html").read_text())


def test_every_piece_is_on_the_page(run: Path) -> None:
    page = read(build(run))
    assert "hostile" in page.text and DRAWN_FILMS in page.text and "65 s" in page.text
    films = [attrs for _, attrs in page.tags if str(attrs.get("src")).startswith("data:image/png")]
    charts = [attrs for _, attrs in page.tags if str(attrs.get("src")).startswith("data:image/svg")]
    assert len(films) == 3 and len(charts) > 5
    assert "grpo, step 10: highest mean reward" in page.text and "lowest mean reward" in page.text
    assert "4 reports of the middle are not shown." in page.text
    assert "left effusion" in page.text and "versions.torch" in page.text
    assert "metrics.jsonl: 1 broken lines were left out." in page.text
    assert "nan" not in page.text.lower().split()


def test_same_folder_gives_the_same_page(run: Path) -> None:
    assert build(run).read_bytes() == build(run).read_bytes()


def test_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    page = read(build(tmp_path))
    for piece in ("recipe.yaml", "manifest.json", "metrics.jsonl", "samples/samples.json"):
        assert f"{piece} is not there" in page.text
    assert "No evaluation" in page.text and "No rollouts" in page.text
    with pytest.raises(UserError, match="nowhere"):
        build(tmp_path / "nowhere")


def test_broken_pieces_are_named_and_the_rest_is_shown(run: Path) -> None:
    (run / "manifest.json").write_text("{not json")
    (run / "rollouts" / "grpo" / "step-000010.parquet").write_bytes(b"PAR1 no parquet")
    next((run / "samples").glob("*.png")).unlink()
    (run / "metrics.jsonl").unlink()
    page = read(build(run))
    assert "manifest.json cannot be read" in page.text
    assert "rollouts/grpo/step-000010.parquet cannot be read" in page.text
    assert ".png is not there" in page.text and "metrics.jsonl is not there" in page.text
    assert "positive findings F1" in page.text


def test_a_run_under_way_shows_the_curves_of_its_stages(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "sft"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 2.0}\n')
    page = read(build(tmp_path))
    assert "Learning curves" in page.text


def test_samples_are_picked_blind_and_splits_kept_apart(tmp_path: Path) -> None:
    film = StudyImage(np.zeros((700, 900), dtype=np.uint8))
    studies = [Study(f"a/{i}", images=(film,), findings="Clear.") for i in range(30)]
    good = write_samples(tmp_path, studies, {"x": {s.id: "good" for s in studies}}, split="test", count=4)
    ids = [row["id"] for row in json.loads(good.read_text())]
    write_samples(tmp_path, studies, {"x": {s.id: "bad" for s in studies}}, split="test", count=4)
    write_samples(tmp_path, studies[:2], {}, split="dev", count=4)
    rows = json.loads(good.read_text())
    assert [row["id"] for row in rows if row["split"] == "test"] == ids and len(rows) == 6
    assert all((tmp_path / "samples" / row["image"]).exists() for row in rows)
    from PIL import Image

    assert Image.open(tmp_path / "samples" / rows[0]["image"]).size == (512, 398)
