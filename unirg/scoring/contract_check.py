"""Does a reward keep the contract (`unirg.scoring.contract`)? It is run on invented studies, and every finding is said
in a sentence.

What it costs a run when it does not: a reward that fails on odd text masks or ends the run on the first odd report of a
young policy; one that depends on the batch scores the same report differently from step to step; one that changes its
inputs changes those of the rewards after it.
"""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unirg.scoring.contract import RewardError, ScoreBatch, study_columns
from unirg.scoring.registry import Reward
from unirg.scoring.worker import described
from unirg.study import Study

Scores = list[float | None]

STUDIES = (
    Study(
        id="invented-1",
        indication="Cough.",
        comparison="None.",
        technique="Frontal and lateral view.",
        findings="There is a small left pleural effusion. The heart is mildly enlarged. No pneumothorax.",
        impression="Small left pleural effusion.",
        labels={"effusion": 1, "effusion/left": 1, "effusion/right": 0, "cardiomegaly": 1, "pneumothorax": 0},
        patient="p1",
        institution="a",
        demographics={"sex": "F"},
        modality="CR",
        language="en",
    ),
    Study(
        id="invented-2",
        indication="Fever.",
        findings="Right lower lobe consolidation. No pleural effusion. Heart size is normal.",
        impression="Right lower lobe pneumonia.",
        labels={"consolidation": 1, "consolidation/right": 1, "effusion": 0, "cardiomegaly": 0},
        patient="p2",
        institution="b",
    ),
    Study(
        id="invented-3",
        findings="Moderate right pneumothorax. A chest tube is in place. Mild bibasilar atelectasis.",
        labels={"pneumothorax": 1, "pneumothorax/right": 1, "atelectasis": 1, "effusion": 0},
    ),
    Study(
        id="invented-4",
        findings="The lungs are clear. No pleural effusion or pneumothorax. Heart size is normal.",
        impression="No acute disease.",
        labels={"effusion": 0, "pneumothorax": 0, "cardiomegaly": 0},
    ),
)
REFERENCES = [" ".join(filter(None, (study.findings, study.impression))) for study in STUDIES]
ODD = {
    "empty text": "",
    "blanks": " \n\t ",
    "one word": "no",
    "no letters": "... 123 --- ?!",
    "other scripts": "肺部清晰。Лёгкие чистые. الرئتان صافيتان. 🫁",
    "control and combining characters": "\x00\x07 e\u0301ffusion\u200b \ufeff \ufffd",
    "one word 2,000 times": "effusion " * 2000,
    "2,000 words": " ".join(REFERENCES * 50),
    "10,000 letters without a space": "a" * 10_000,
}
PER_STUDY = 4
ROUNDING = 1e-4
"""What batches of another make-up may change: a model pads them differently."""


@dataclass(frozen=True)
class Finding:
    """One sentence about a reward: right, wrong (a breach of the contract), or a note."""

    kind: Literal["right", "wrong", "note"]
    text: str


class _Failed(Exception):
    """The reward raised, or what it returned breaks the contract. The message says what."""


def check_contract(reward: Reward) -> list[Finding]:
    """What is right and what is wrong with a reward that is set up, in the order of what it was asked.

    Raises nothing that the reward raises: that is a finding. Where ordinary reports cannot be scored, the list ends
    there.
    """
    batch, missing = _ordinary(reward)
    findings = [
        Finding("note", f"needs '{name}': a column of your own data, None here, or an option to give ({name}=...)")
        for name in missing
    ]
    try:
        scores = _score(reward, batch)
    except _Failed as failure:
        return [*findings, Finding("wrong", f"ordinary reports: {failure}")]
    findings += _about_values(scores)
    findings += _silence(reward, batch, scores)
    for check in (_odd_texts, _gaps, _no_columns, _no_rows, _again, _inputs):
        findings += check(reward, batch)
    findings += _order(reward, batch, scores)
    if reward.deduplicate:
        findings += _company(reward, batch, scores)
    else:
        findings.append(Finding("note", "says `deduplicate = False`: its score depends on the candidates beside it"))
    if reward.has_corpus_terms:
        findings.append(_corpus(reward, batch))
    return findings + _says_of_itself(reward)


def _ordinary(reward: Reward) -> tuple[ScoreBatch, list[str]]:
    """Reports of each study (its own, the next one's, half of its own, its own in capitals), and the columns that the
    reward asks for by name and that no study has as such."""
    candidates, rows = [], []
    for row, own in enumerate(REFERENCES):
        words = own.split()
        candidates += [own, REFERENCES[(row + 1) % len(STUDIES)], " ".join(words[: len(words) // 2]), own.upper()]
        rows += [row] * PER_STUDY
    columns = study_columns([STUDIES[row] for row in rows]) | {"truncated": [False] * len(rows)}
    parameters = list(inspect.signature(reward.function).parameters.values())[2:]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in columns]
    columns |= {name: [None] * len(rows) for name in missing}
    return ScoreBatch(candidates, [REFERENCES[row] for row in rows], columns), missing


def _about_values(scores: Scores) -> list[Finding]:
    judged = [score for score in scores if score is not None]
    if not judged:
        return [
            Finding("note", f"could judge none of {len(scores)} ordinary reports (all None): this check shows little")
        ]
    spread = f"{min(judged):.3g} to {max(judged):.3g}, mean {sum(judged) / len(judged):.3g}"
    masked = f"; {len(scores) - len(judged)} masked (None)" if len(judged) < len(scores) else ""
    findings = [Finding("right", f"one finite number or None for each of {len(scores)} reports: {spread}{masked}")]
    if len(set(judged)) == 1:
        findings.append(
            Finding("note", "all of them score the same: reports that differ so give a policy no direction")
        )
    return findings


def _odd_texts(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    """Each odd text as a report about the first study."""
    try:
        _score(reward, _rows(batch, [0] * len(ODD), list(ODD.values())))
    except _Failed as together:
        return _failing_texts(reward, batch) or [Finding("wrong", f"odd reports in one batch: {together}")]
    return [Finding("right", f"scores whatever is written: {', '.join(ODD)}")]


def _failing_texts(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    """Which of the odd texts fail by themselves."""
    findings = []
    for name, text in ODD.items():
        try:
            _score(reward, _rows(batch, [0], [text]))
        except _Failed as failure:
            findings.append(Finding("wrong", f"{name} as a report: {failure}"))
    return findings


def _silence(reward: Reward, batch: ScoreBatch, scores: Scores) -> list[Finding]:
    """No text about each study, beside its own report's score: a policy must not do well by saying nothing."""
    rows = [row for row in range(0, len(scores), PER_STUDY) if scores[row] is not None]
    try:
        silent = _score(reward, _rows(batch, rows, [""] * len(rows)))
    except _Failed as failure:
        return [Finding("wrong", f"empty reports: {failure}")]
    for row, silence in zip(rows, silent, strict=True):
        study, own = batch.study_ids()[row], scores[row]
        assert own is not None
        if silence is None:
            said = (
                f"an empty report is masked (None) where one is judged (study {study}); give silence the lowest score"
            )
            return [Finding("wrong", said)]
        if silence >= own:
            said = (
                f"an empty report scores {silence:.3g} where the study's own scores {own:.3g}: a policy may fall silent"
            )
            return [Finding("note", f"{said} (study {study}: {REFERENCES[row // PER_STUDY]})")]
    return [Finding("right", "an empty report scores less than the study's own")] if rows else []


def _gaps(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    """Studies that lack what they may lack: the reference, or all else that is known of them."""
    known = {"study_id", "truncated"}
    bare = study_columns([Study(id="invented-5")])
    bare |= {name: [None] for name in batch.columns if name not in bare and name not in known}
    own = _rows(batch, [0])
    findings = []
    for what, references, columns in (
        ("a study without a reference report", [""], own.columns),
        ("a study of which only the report is known", own.references, bare | {"truncated": [False]}),
        ("a study of which nothing is known", [""], bare | {"truncated": [False]}),
    ):
        try:
            score = _score(reward, ScoreBatch(own.candidates, references, columns))[0]
            said = "is masked (None)" if score is None else f"scores {score:.3g}"
            findings.append(Finding("right", f"{what} {said}"))
        except _Failed as failure:
            findings.append(Finding("wrong", f"{what} (its columns are None, its labels empty): {failure}"))
    return findings


def _no_columns(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    """Other trainers' data need not have a study's columns: a reward does without, or the error names the column."""
    try:
        reward.score(list(batch.candidates), list(batch.references))
    except (Exception, SystemExit) as error:
        told = isinstance(error, RewardError) and not str(error).startswith(f"reward '{reward.name}' returned")
        if told:
            return [Finding("right", f"data without a column that it needs is refused: {error}")]
        hint = "name the columns you need as parameters, and the error names what is missing"
        return [Finding("wrong", f"data without columns: {described(error)}; {hint}")]
    return [Finding("right", "does without any column")]


def _no_rows(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    try:
        _score(reward, _rows(batch, []))
    except _Failed as failure:
        return [Finding("wrong", f"an empty batch: {failure}; expected []")]
    return [Finding("right", "an empty batch has no scores")]


def _again(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    return _compare(
        lambda: (_score(reward, batch), _score(reward, batch)),
        1e-6,
        "the same reports score the same when asked again",
        "the same reports, asked again, score otherwise",
        batch,
    )


def _inputs(reward: Reward, batch: ScoreBatch) -> list[Finding]:
    given = copy.deepcopy(batch)
    try:
        _score(reward, given, own_lists=True)
    except _Failed as failure:
        return [Finding("wrong", f"ordinary reports, asked again: {failure}")]
    for name, before, after in (
        ("candidates", batch.candidates, given.candidates),
        ("references", batch.references, given.references),
        *((f"column '{key}'", values, given.columns[key]) for key, values in batch.columns.items()),
    ):
        if before != after:
            return [Finding("wrong", f"changes its inputs: {name} is another after the call; work on a copy")]
    return [Finding("right", "leaves its inputs as they were")]


def _order(reward: Reward, batch: ScoreBatch, scores: Scores) -> list[Finding]:
    rows = [*range(1, len(scores), 2), *range(0, len(scores), 2)]
    return _compare(
        lambda: ([scores[row] for row in rows], _score(reward, _rows(batch, rows))),
        ROUNDING,
        "the order of a batch does not matter",
        "in another order of the batch, a report scores otherwise",
        _rows(batch, rows),
    )


def _company(reward: Reward, batch: ScoreBatch, scores: Scores) -> list[Finding]:
    """Alone, and twice in one batch."""
    rows = list(range(len(scores)))
    advice = "where that is meant, set `deduplicate = False`"
    return _compare(
        lambda: (scores, [_score(reward, _rows(batch, [row]))[0] for row in rows]),
        ROUNDING,
        "a report scores alone as it does among others",
        f"alone, a report scores otherwise than among others ({advice})",
        batch,
    ) + _compare(
        lambda: (scores * 2, _score(reward, _rows(batch, rows * 2))),
        ROUNDING,
        "a report that comes twice in a batch has one score",
        f"reports that come twice in a batch score otherwise ({advice})",
        _rows(batch, rows * 2),
    )


def _corpus(reward: Reward, batch: ScoreBatch) -> Finding:
    """The terms of the ordinary reports, and of none and of an odd one."""
    try:
        for rows, candidates in (
            ([], None),
            (list(range(len(batch.candidates))), None),
            ([0] * len(ODD), ODD.values()),
        ):
            given = copy.deepcopy(_rows(batch, rows, list(candidates or ())))
            figures = reward.corpus_terms(given.candidates, given.references, **given.columns)
    except (Exception, SystemExit) as error:
        return Finding("wrong", f"figures of a corpus: {described(error)}")
    return Finding("right", f"has figures of a corpus: {', '.join(figures)}")


def _says_of_itself(reward: Reward) -> list[Finding]:
    findings = []
    try:
        json.dumps(reward.identity)
    except Exception as error:
        findings.append(Finding("wrong", f"`identity` cannot be kept in a run's manifest: {described(error)}"))
    if reward.evaluation_only:
        findings.append(Finding("note", f"is for evaluation only ({reward.evaluation_only}): training refuses it"))
    if not inspect.getdoc(reward.written):
        findings.append(
            Finding("note", "has no docstring: its first line is what `unirg rewards` says that it measures")
        )
    return findings


def _compare(
    ask: Callable[[], tuple[Scores, Scores]], tolerance: float, right: str, wrong: str, batch: ScoreBatch
) -> list[Finding]:
    """Two answers about the rows of `batch` that should be one; `wrong` is said with the first row that differs."""
    try:
        before, after = ask()
    except _Failed as failure:
        return [Finding("wrong", f"{wrong}: {failure}")]
    for row, (one, other) in enumerate(zip(before, after, strict=True)):
        if not _same(one, other, tolerance):
            return [Finding("wrong", f"{wrong}: {one} and {other} (study {batch.study_ids()[row]})")]
    return [Finding("right", right)]


def _same(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def _rows(batch: ScoreBatch, rows: Sequence[int], candidates: list[str] | None = None) -> ScoreBatch:
    """The batch of these rows, with other candidates where given."""

    def chosen(values: list[Any]) -> list[Any]:
        return [values[row] for row in rows]

    columns = {name: chosen(values) for name, values in batch.columns.items()}
    return ScoreBatch(candidates or chosen(batch.candidates), chosen(batch.references), columns)


def _score(reward: Reward, batch: ScoreBatch, *, own_lists: bool = False) -> Scores:
    """The reward's scores of a copy of the batch (`own_lists`: of the batch itself). Raises _Failed."""
    given = batch if own_lists else copy.deepcopy(batch)
    try:
        return reward.score(given.candidates, given.references, **given.columns)
    except (Exception, SystemExit) as error:
        raise _Failed(described(error)) from error
