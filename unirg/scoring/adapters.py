"""Any UniRG reward as a reward of TRL, verl, EasyR1 or ms-swift, in the calling convention of each.

    GRPOTrainer(reward_funcs=[trl_reward("entity_f1"), trl_reward("bleu", {"variant": "rexrank"})], ...)

Rewards are named as everywhere in UniRG: an installed name, `path/to/file.py:function`, `package.module:function`. They
are looked up at once, so that a misspelt name or option, or a reward that is for evaluation only, fails before training
does; they load their models at the first score. Nothing of the other framework is imported. What a wrapped reward
answers is the reward's own score, unchanged.

None, "cannot judge", reaches TRL and ms-swift as it is: both leave the sample out of that reward. verl and EasyR1 know
no such thing. There a None is an error, unless `unscored` says what it is to count as.

Conventions as in TRL 1.16 (GRPOTrainer), verl (`custom_reward_function`, reward managers `naive` and `batch`), EasyR1
(`REWARD_TYPE = "batch"`) and ms-swift 3 and 4 (`orms`).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward

Options = Mapping[str, Any]
Score = Callable[[list[str], list[str], dict[str, list[Any]]], list[float | None]]

_ARGUMENTS = ("candidates", "references")  # what a reward's two lists are called, and so no column can be
_EASYR1_TEXTS = ("response", "ground_truth")


def trl_reward(
    name: str,
    options: Options | None = None,
    *,
    label: str | None = None,
    reference: str | None = "ground_truth",
    device: str = "cpu",
) -> Callable[..., list[float | None]]:
    """A function for `reward_funcs` of TRL's GRPOTrainer, logged as `rewards/<label>/mean` and `/std`.

    `label` is the reward's own name where not given. `reference` names the dataset's column of reference texts (None:
    the reward needs none); every other column reaches the reward under its own name. Completions may be plain texts or
    conversations: the report is then the text of the last message.

    Raises RewardError where the reward cannot be loaded, and when scoring where the reference column is missing.
    """
    score = _scorer(name, options, device)

    def reward(completions: Sequence[Any], **given: Any) -> list[float | None]:
        candidates = [_report(name, completion) for completion in completions]
        return score(candidates, *_split(name, reference, len(candidates), given))

    reward.__name__ = label or name.rpartition(":")[2]
    return reward


def verl_reward(
    name: str, options: Options | None = None, *, unscored: float | None = None, device: str = "cpu"
) -> Callable[..., float]:
    """A `compute_score` for verl's `custom_reward_function`: one report a call.

    `ground_truth` is the reference text ("" or None: there is none); `data_source` and every key of `extra_info` reach
    the reward as columns. `unscored` is the value of a report that the reward cannot judge.

    Raises RewardError where the reward cannot be loaded, and when scoring on a None without `unscored`.
    """
    score_batch = verl_batch_reward(name, options, unscored=unscored, device=device)

    # verl hands over the two last ones where a reward model runs beside the function.
    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: str | None,
        extra_info: Mapping[str, Any] | None = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> float:
        return score_batch([data_source], [solution_str], [ground_truth], [extra_info])[0]

    return compute_score


def verl_batch_reward(
    name: str, options: Options | None = None, *, unscored: float | None = None, device: str = "cpu"
) -> Callable[..., list[float]]:
    """As `verl_reward`, for verl's reward manager `batch`: lists of all four, one score each. Faster wherever a model
    scores, and right for rewards that compare candidates."""
    score = _scorer(name, options, device)

    def compute_score(
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[str | None],
        extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> list[float]:
        rows = [dict(extra or {}) for extra in ([None] * len(solution_strs) if extra_infos is None else extra_infos)]
        columns = _columns(rows) | {"data_source": list(data_sources)}
        _check_names(name, columns)
        references = [_reference(name, row, text) for row, text in enumerate(ground_truths)]
        return _numbers(name, score(list(solution_strs), references, columns), unscored)

    return compute_score


def easyr1_reward(
    name: str, options: Options | None = None, *, unscored: float | None = None, device: str = "cpu"
) -> Callable[[list[dict[str, Any]]], list[dict[str, float]]]:
    """A function for EasyR1's `worker.reward.reward_function`, in a file that says `REWARD_TYPE = "batch"`.

    Each row's `response` is the report and `ground_truth` the reference; what else a row has (`response_length`)
    reaches the reward as columns. Answers `{"overall": score}` for each. `unscored` and errors as in `verl_reward`.
    """
    score = _scorer(name, options, device)

    def compute_score(reward_inputs: list[dict[str, Any]]) -> list[dict[str, float]]:
        candidates = [row["response"] for row in reward_inputs]
        references = [_reference(name, number, row["ground_truth"]) for number, row in enumerate(reward_inputs)]
        columns = _columns([{k: v for k, v in row.items() if k not in _EASYR1_TEXTS} for row in reward_inputs])
        _check_names(name, columns)
        return [{"overall": value} for value in _numbers(name, score(candidates, references, columns), unscored)]

    return compute_score


def swift_reward(
    name: str,
    options: Options | None = None,
    *,
    label: str | None = None,
    reference: str | None = "solution",
    device: str = "cpu",
) -> type:
    """A class for ms-swift's table `orms`, in a file that `--external_plugins` names: `orms["x"] = swift_reward("x")`.

    Arguments and errors as in `trl_reward`. ms-swift drops the dataset's own answer from `messages`: keep the reference
    in a column of its own. The class's name, which ms-swift logs, is `label`.
    """
    score = _scorer(name, options, device)

    class Orm:
        def __init__(self, args: Any = None, **kwargs: Any) -> None:
            self.args = args

        def __call__(self, completions: Sequence[Any], **given: Any) -> list[float | None]:
            candidates = [_report(name, completion) for completion in completions]
            return score(candidates, *_split(name, reference, len(candidates), given))

    Orm.__name__ = Orm.__qualname__ = label or name.rpartition(":")[2]
    return Orm


def _scorer(name: str, options: Options | None, device: str) -> Score:
    """The reward's scores, its model loaded at the first call. verl calls from several threads at once, and neither
    models' tokenizers nor a reward's own caches need to stand that: one call runs at a time."""
    reward = load_reward(name, options)
    if reward.evaluation_only:
        raise RewardError(f"reward '{name}' is for evaluation only, not to train on: {reward.evaluation_only}")
    lock, ready = threading.Lock(), False

    def score(candidates: list[str], references: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        nonlocal ready
        with lock:
            if not ready:
                reward.setup(device)
                ready = True
            return reward.score(candidates, references, **columns)

    return score


def _report(name: str, completion: Any) -> str:
    """The report in a completion: the text itself, or that of a conversation's last message."""
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1].get("content") or ""  # None where a message only calls a tool
        if isinstance(content, str):
            return content
        return "".join(part["text"] for part in content if part["type"] == "text")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise RewardError(
            f"reward '{name}': cannot read a completion of type {type(completion).__name__}; expected a text, or a "
            "list of messages with `content`"
        ) from error


def _split(
    name: str, reference: str | None, count: int, given: Mapping[str, Any]
) -> tuple[list[str], dict[str, list[Any]]]:
    """References and columns among what a trainer hands over. What is no list of `count` values (`trainer_state`,
    `log_metric`) is the trainer's own."""
    columns = {key: list(values) for key, values in given.items() if isinstance(values, list) and len(values) == count}
    if reference is None:
        references = [""] * count
    elif reference not in columns:
        raise RewardError(
            f"reward '{name}' takes column '{reference}' as reference; the data has: {', '.join(sorted(columns))}. "
            "Name it with reference=..., or say reference=None"
        )
    else:
        references = [_reference(name, row, text) for row, text in enumerate(columns.pop(reference))]
    _check_names(name, columns)
    return references, columns


def _reference(name: str, row: int, text: Any) -> str:
    if text is not None and not isinstance(text, str):
        raise RewardError(f"reward '{name}': the reference of row {row} is a {type(text).__name__}, expected a text")
    return text or ""


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; None where a row lacks a key."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def _check_names(name: str, columns: Mapping[str, Any]) -> None:
    for taken in _ARGUMENTS:
        if taken in columns:
            raise RewardError(
                f"reward '{name}': a column of the data is called '{taken}', as a reward's texts; rename it"
            )


def _numbers(name: str, scores: list[float | None], unscored: float | None) -> list[float]:
    for row, value in enumerate(scores):
        if value is None and unscored is None:
            raise RewardError(
                f"reward '{name}' cannot judge row {row}, and a sample cannot be left out here; leave such studies out "
                "of the data, or say with unscored=... what they are to count as"
            )
    return [unscored if value is None else value for value in scores]  # type: ignore[misc]
