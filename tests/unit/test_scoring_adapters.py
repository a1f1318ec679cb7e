"""Rewards in other trainers' calling conventions: TRL's own trainer, and the signatures that the others document."""

import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import families
from unirg.scoring.adapters import easyr1_reward, swift_reward, trl_reward, verl_batch_reward, verl_reward
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward

FILE = '''
import threading
import time

calls, setups, inside = [], [], []

class Kept:
    """Keeps what it receives; None where there is no reference."""

    def __init__(self, worth=1.0):
        self.worth = worth

    def setup(self):
        setups.append(threading.current_thread())

    def score(self, candidates, references, **columns):
        inside.append(1)
        time.sleep(0.01)
        assert len(inside) == 1, "two calls at once"
        calls.append((candidates, references, columns))
        scores = [len(a) * self.worth / 100 if b else None for a, b in zip(candidates, references)]
        inside.pop()
        return scores

class Vain:
    evaluation_only = "it counts adjectives"

    def score(self, candidates, references, **columns):
        return [0.5] * len(candidates)

def by_site(candidates, references, site):
    return [float(name == "A") for name in site]
'''
REPORT, OTHER = "Small left pleural effusion.", "No pneumothorax."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


def kept(path: Path) -> Any:
    """The module that the reward runs in."""
    return inspect.getmodule(load_reward(f"{path}:by_site").written)


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("conversational", [False, True])
def test_trl_trains_on_a_reward(file: Path, tmp_path: Path, conversational: bool) -> None:
    """Two steps of TRL's own trainer: what the reward receives, what TRL logs of it, and a masked study."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import transformers

    families.llama(tmp_path / "model")
    rows = [
        {"prompt": "Write the report.", "ground_truth": REPORT, "study_id": "a", "site": "A"},
        {"prompt": "Write the report again.", "ground_truth": None, "study_id": "b", "site": "B"},
    ]
    if conversational:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    rewards = [
        trl_reward(f"{file}:Kept", {"worth": 2.0}, label="length"),
        trl_reward(f"{file}:by_site", reference=None),
        trl_reward("entity_f1"),
    ]
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    trainer.train()
    calls = kept(file).calls
    assert len(kept(file).setups) == 1
    logs = [record for record in trainer.state.log_history if "reward" in record]
    assert len(calls) == len(logs) == 2
    for (candidates, references, columns), log in zip(calls, logs):
        assert all(isinstance(text, str) for text in candidates) and any(candidates)
        assert sorted(references) == ["", "", REPORT, REPORT]
        assert columns["study_id"] == ["a" if text else "b" for text in references]
        assert {"trainer_state", "log_metric", "log_extra", "ground_truth"}.isdisjoint(columns)
        judged = [2 * len(text) / 100 for text, reference in zip(candidates, references) if reference]
        assert log["rewards/length/mean"] == pytest.approx(sum(judged) / 2, rel=1e-5)
        assert log["rewards/by_site/mean"] == 0.5
        own = load_reward("entity_f1").score(candidates, references, **columns)
        assert log["rewards/entity_f1/mean"] == pytest.approx(sum(s for s in own if s is not None) / 2, rel=1e-5)


def test_trl_a_conversations_report_is_its_last_message() -> None:
    reward = trl_reward("bleu")
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "Small left "}, {"type": "image"}]}]
    parts[0]["content"].append({"type": "text", "text": "pleural effusion."})  # type: ignore[attr-defined]
    silent = [{"role": "assistant", "content": None, "tool_calls": []}]
    turns = [*conversation(OTHER), {"role": "tool", "content": "x"}, *conversation(REPORT)]
    scores = reward(
        prompts=[[]] * 4, completions=[parts, silent, turns, conversation(OTHER)], ground_truth=[REPORT] * 4
    )
    assert scores == load_reward("bleu").score([REPORT, "", REPORT, OTHER], [REPORT] * 4)
    assert scores[0] == 1.0 and scores[1] == 0.0


def test_trl_says_what_it_cannot_use(file: Path) -> None:
    with pytest.raises(RewardError, match=r"takes column 'ground_truth' as reference; the data has: prompts, report\."):
        trl_reward("bleu")(prompts=["p"], completions=["x"], report=["y"])
    with pytest.raises(RewardError, match="reference of row 1 is a list, expected a text"):
        trl_reward("bleu")(completions=["x", "y"], ground_truth=["y", ["z"]])
    with pytest.raises(RewardError, match="called 'candidates'"):
        trl_reward("bleu")(completions=["x"], ground_truth=["y"], candidates=["z"])
    with pytest.raises(RewardError, match="cannot read a completion of type int"):
        trl_reward("bleu")(completions=[3], ground_truth=["y"])
    with pytest.raises(RewardError, match=r"no option 'varient' \(nearest: variant\)"):
        trl_reward("bleu", {"varient": "coco4"})
    with pytest.raises(
        RewardError, match=r"own.py:Vain' is for evaluation only, not to train on: it counts adjectives"
    ):
        trl_reward(f"{file}:Vain")


def test_log_names(file: Path) -> None:
    assert trl_reward("bleu").__name__ == "bleu"
    assert trl_reward(f"{file}:by_site").__name__ == "by_site"
    assert trl_reward("bleu", label="b4").__name__ == "b4"
    # ms-swift logs the class's name of what is no plain function.
    assert type(swift_reward(f"{file}:by_site")()).__name__ == "by_site"


def test_verl_scores_one_report(file: Path) -> None:
    """As the reward managers `naive` and `dapo` call it: by keyword, extra_info with verl's own keys in it."""
    compute_score = verl_reward(f"{file}:Kept")
    extra = {"site": "A", "num_turns": None, "rollout_reward_scores": {}}
    score = compute_score(data_source="cxr", solution_str="a" * 50, ground_truth=REPORT, extra_info=extra)
    assert score == 0.5 and isinstance(score, float)
    assert kept(file).calls == [
        (
            ["a" * 50],
            [REPORT],
            {"site": ["A"], "num_turns": [None], "rollout_reward_scores": [{}], "data_source": ["cxr"]},
        )
    ]
    assert compute_score("cxr", "a", REPORT) == 0.01
    # What verl's config may add is refused, not swallowed, but for what verl itself adds.
    assert compute_score("cxr", "a", REPORT, {}, reward_router_address="h:1", reward_model_tokenizer=None) == 0.01
    with pytest.raises(TypeError, match="worth"):
        compute_score("cxr", "a", REPORT, {}, worth=3)
    assert not inspect.iscoroutinefunction(compute_score)


def test_verl_scores_a_batch(file: Path) -> None:
    """As the reward manager `batch` calls it; its columns are arrays of objects, and an extra_info may be missing."""
    compute_score = verl_batch_reward("entity_f1")
    arrays = {
        "data_sources": np.array(["cxr", "cxr"], dtype=object),
        "ground_truths": [REPORT, REPORT],
        "extra_infos": np.array([{"site": "A"}, None], dtype=object),
    }
    assert compute_score(solution_strs=[REPORT, OTHER], **arrays) == [1.0, 0.0]
    verl_batch_reward(f"{file}:Kept")(solution_strs=["x", "y"], **arrays)
    assert kept(file).calls[0][2] == {"site": ["A", None], "data_source": ["cxr", "cxr"]}


def test_verl_calls_from_many_threads_take_turns(file: Path) -> None:
    compute_score = verl_reward(f"{file}:Kept")
    scores: list[float] = []
    threads = [threading.Thread(target=lambda: scores.append(compute_score("d", "abc", "r"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [0.03] * 8  # a second call inside the first would have raised
    assert len(kept(file).setups) == 1


def test_easyr1_scores_a_batch(file: Path) -> None:
    compute_score = easyr1_reward("entity_f1")
    rows = [{"response": text, "response_length": 5, "ground_truth": REPORT} for text in (REPORT, OTHER)]
    assert compute_score(rows) == [{"overall": 1.0}, {"overall": 0.0}]
    assert compute_score([]) == []
    assert set(rows[0]) == {"response", "response_length", "ground_truth"}
    easyr1_reward(f"{file}:Kept")(rows)
    assert kept(file).calls[0] == ([REPORT, OTHER], [REPORT] * 2, {"response_length": [5, 5]})


def test_without_masks_a_none_is_an_error_or_a_stated_value() -> None:
    rows = [{"response": REPORT, "ground_truth": REPORT}, {"response": REPORT, "ground_truth": ""}]
    with pytest.raises(RewardError, match="'bleu' cannot judge row 1"):
        easyr1_reward("bleu")(rows)
    assert easyr1_reward("bleu", unscored=0.25)(rows)[1] == {"overall": 0.25}
    with pytest.raises(RewardError, match="cannot judge row 0"):
        verl_reward("bleu")("cxr", REPORT, None)
    assert verl_reward("bleu", unscored=-1.0)("cxr", REPORT, None) == -1.0
    with pytest.raises(RewardError, match="reference of row 0 is a dict"):
        verl_reward("bleu")("cxr", REPORT, {"target": REPORT})


def test_swift_builds_a_class_and_calls_its_instance(file: Path) -> None:
    """ms-swift passes on those of its arguments that `__init__` names; it calls with completions and the columns."""
    orm = swift_reward(f"{file}:Kept", {"worth": 2.0}, label="length")
    assert {"self", "args", "kwargs"} == set(inspect.signature(orm.__init__).parameters)
    instance = orm(args=object())
    assert not inspect.iscoroutinefunction(instance.__call__)
    state = object()
    assert instance(["abc", "a"], solution=[REPORT, None], site=["A", "B"], trainer_state=state) == [0.06, None]
    assert kept(file).calls == [(["abc", "a"], [REPORT, ""], {"site": ["A", "B"]})]
