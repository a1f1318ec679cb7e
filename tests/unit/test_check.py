"""What is verified before training: vision stages, films by size, shares of a step, trackers."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unirg import check
from unirg.errors import UserError
from unirg.policy import Policy
from unirg.recipe.schema import Recipe, StageConfig
from unirg.study import Study, StudyImage


def stage(kind: str = "sft", **keys: Any) -> StageConfig:
    return recipe(
        stages=[{"name": "s", "kind": kind, "steps": 1, "optimiser": {"learning_rate": 1e-3}, **keys}]
    ).stages[0]


def recipe(**keys: Any) -> Recipe:
    stages = [{"name": "s", "kind": "sft", "steps": 1, "optimiser": {"learning_rate": 1e-3}}]
    settings = {"name": "x", "data": {"adapter": "phantom"}, "policy": {"tiny": {}}, "stages": stages}
    return Recipe.model_validate(settings | keys)


def film(folder: Path, name: str, size: int) -> StudyImage:
    Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / name)
    return StudyImage(folder / name)


def test_a_vision_stage_needs_films_and_labels(tmp_path: Path) -> None:
    films = (film(tmp_path, "a.png", 8),)
    seen = Study("a", films, findings="Clear.", labels={"effusion": 0})
    check.check_split([seen], "train", [stage("vision")])
    with pytest.raises(UserError, match=r"^study b: no image, and stage s trains the vision tower$"):
        check.check_split([seen, Study("b", findings="Clear.", labels={"effusion": 1})], "train", [stage("vision")])
    with pytest.raises(UserError, match="no training study has any"):
        check.check_split([Study("a", films, findings="Clear.")], "train", [stage("vision")])


def test_films_are_read_once_for_all_starts_of_a_run(tmp_path: Path) -> None:
    """Until one of them shows another size or time, or another is asked for."""
    rows = []
    for i in range(12):
        film(tmp_path, f"{i}.png", 8)
        rows.append({"id": f"s{i}", "images": [f"{i}.png", "0.png"], "findings": "Clear."})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"adapter": "jsonl", "files": {"train": str(tmp_path / "train.jsonl")}}
    asked = recipe(data=data, evaluation={"splits": []})
    broken, mark = check.read_films(asked)
    assert broken == {}

    spoilt, gone = tmp_path / "5.png", tmp_path / "7.png"
    times = spoilt.stat()
    spoilt.write_bytes(bytes(times.st_size))
    os.utime(spoilt, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check.read_films(asked, mark) == ({}, mark)  # none was read
    found, same = check.read_films(asked, "another")
    assert same == mark and list(found) == [spoilt] and found[spoilt].startswith(f"corrupt image: {spoilt}")
    gone.unlink()
    found, other = check.read_films(asked, mark)
    assert other != mark and found[gone] == f"missing image {gone}" and set(found) == {spoilt, gone}


def test_one_large_film_among_many_studies_with_more_text_is_found(
    tiny_policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = film(tmp_path, "small.png", 32)
    studies = [Study(f"s{i}", (small,), indication="cough " * 20, findings="Clear.") for i in range(120)]
    studies.insert(70, Study("large", (film(tmp_path, "large.png", 512),), findings="Clear."))
    studies.insert(20, Study("wordy", (small,), indication="よ" * 60, findings="Clear."))
    seen: list[str] = []
    monkeypatch.setattr(Policy, "encode", lambda self, study: seen.append(study.id))
    check.check_prompts(tiny_policy, studies)
    assert {"large", "wordy"} <= set(seen) and len(seen) == len(set(seen)) <= 2 * check.PROMPTS


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_special_token_in_any_study_is_found(tiny_policy: Policy, tmp_path: Path, token: str) -> None:
    films = (film(tmp_path, "a.png", 32),)
    studies = [Study(f"s{i}", films, indication="cough " * 20, findings="Clear.") for i in range(60)]
    studies.append(Study("odd", films, indication=f"{token}Write.", findings="Clear."))
    with pytest.raises(UserError, match=r"study odd: its context holds '<.*>', a special token of the model"):
        check.check_prompts(tiny_policy, studies)


@pytest.mark.parametrize(
    ("studies", "forward", "world", "fits"),
    [(8, None, 2, True), (8, None, 3, False), (8, 3, 1, False), (8, 2, 4, True), (8, 16, 1, True), (6, 2, 2, False)],
)
def test_shares_are_whole(studies: int, forward: int | None, world: int, fits: bool) -> None:
    one = stage(studies_per_step=studies, studies_per_forward=forward)
    if fits:
        check.check_shares(one, world)
    else:
        with pytest.raises(UserError, match=f"studies_per_step {studies} must divide evenly by {world} ranks") as error:
            check.check_shares(one, world)
        advised = re.search(r"stages\.s\.studies_per_step=(\d+) does", str(error.value))
        assert advised
        check.check_shares(stage(studies_per_step=int(advised[1]), studies_per_forward=forward), world)


def test_a_tracker_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "get_available_trackers", list)
    with pytest.raises(UserError, match="trackers: mlflow is not installed"):
        check.check_trackers(recipe(trackers=["mlflow"]))
    check.check_trackers(recipe())


def test_an_engine_that_is_not_there_is_said_before_any_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's trainer needs vLLM too, but for prompts without images."""
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    grpo = [stage("grpo", rewards=[{"name": "bleu"}]).model_dump()]
    served = {"engine": "vllm", "vllm": {"mode": "server", "servers": ["http://127.0.0.1:8000"]}}
    for rollout in ({"engine": "vllm"}, served):
        with pytest.raises(UserError, match="vllm is not installed"):
            check.check_engine(recipe(stages=grpo, rollout=rollout))
        check.check_engine(recipe(stages=[stage("vision").model_dump()], rollout=rollout))  # writes no reports
    check.check_engine(recipe(stages=grpo, rollout=served, prompt={"images": False}))
    check.check_engine(recipe(stages=grpo))


def test_a_stage_that_trains_on_an_evaluation_metric_is_refused() -> None:
    rewards = [{"name": "bleu"}, {"name": "meteor"}]
    trained = recipe(stages=[stage("grpo", rewards=rewards).model_dump()])
    with pytest.raises(UserError, match=r"'meteor' is for evaluation only: .*evaluation\.metrics"):
        check.check(trained, lambda studies: pytest.fail("the policy is built after the rewards are checked"))


def test_the_headline_may_be_a_metrics_figure_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def score(self, candidates, references, **columns):\n"
        "        return [1.0] * len(candidates)\n"
        "    def corpus_terms(self, candidates, references, **columns):\n"
        "        return {'pooled': [(1, 2)] * len(candidates)}\n"
    )
    studies = [Study("a", findings="Clear.", extra={"complete": "Clear."})]
    metrics = [{"name": f"{tmp_path}/mine.py:Mine", "label": "mine"}]
    for headline in ("mine.pooled", "mine.pooled/complete", "mine"):
        check.check_figures(recipe(evaluation={"metrics": metrics, "headline": headline}), studies)
    with pytest.raises(UserError, match=r"'mine.micro' is no figure; there are: .*mine\.pooled, mine\.pooled/complete"):
        check.check_figures(recipe(evaluation={"metrics": metrics, "headline": "mine.micro"}), studies)
