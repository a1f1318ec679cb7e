"""`unirg rewards check`: does a reward keep the contract, and what would a policy learn from it?"""

import faulthandler
import signal
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from unirg.data.phantom import PhantomData, load_phantom
from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.scoring.audit import BASES, Subject, Verdict, audit_rewards
from unirg.scoring.command import parse_rewards
from unirg.scoring.contract import RewardConfig, RewardError, Terms
from unirg.scoring.contract_check import check_contract
from unirg.scoring.probes import PROBES
from unirg.scoring.registry import Reward, load_reward
from unirg.scoring.worker import described

STUDIES = 24
"""Generated studies whose reports are changed: about 700 texts to score."""
WIDTH = 120
LONGER = 10
"""What a set-up, and all probes together, may take is so many times what one call may take."""
GRACE_SECONDS = 5.0
WHERE = {"own": "on the study's own report", "draft": "on a half-right draft"}


class _Hung(BaseException):
    """A time limit has passed. Not an Exception: no reward's `except` is to take it."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Ends what takes longer, in the main thread, by a RewardError that says where it was.

    Code that does not let Python's signals through (C code that holds the interpreter) is ended with the process, a few
    seconds later: status 1, and on stderr the line that it was called from.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hung(_: int, frame: FrameType | None) -> None:
        code = frame.f_code if frame is not None else None
        where = f" (it was at {code.co_filename}:{frame.f_lineno}, in {code.co_name})" if frame and code else ""
        raise _Hung(f"it hangs: {what} had no end in {seconds:g} seconds{where}; `--timeout` sets how long it may take")

    before = signal.signal(signal.SIGALRM, hung)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=2)  # stderr itself
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again each second, for code that catches whatever comes
    try:
        yield
    except _Hung as error:
        raise RewardError(str(error)) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class _Limited(Reward):
    """A reward whose calls have a time limit, in seconds."""

    timeout: float

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        with within(self.timeout, f"a call with {len(candidates)} reports"):
            return super().score(candidates, references, **columns)

    def corpus_terms(self, candidates: list[str], references: list[str], **columns: Any) -> dict[str, list[Terms]]:
        with within(self.timeout, f"corpus_terms of {len(candidates)} reports"):
            return super().corpus_terms(candidates, references, **columns)


def check_reward(text: str, timeout: float = 60.0) -> int:
    """Print what is right and wrong with one reward, written as in `unirg score` (`path.py:fn`, `bleu(variant=coco4)`),
    and then in a paragraph what its scores of changed reports would teach a policy. A call may take `timeout` seconds.

    Returns 1 where it breaks the contract, else 0: what it teaches is for its author to judge. Raises RewardError where
    it cannot be loaded or set up.
    """
    if not timeout > 0:
        raise RewardError(f"--timeout {timeout:g}: expected more than 0 seconds")
    configs = parse_rewards(text)
    if len(configs) != 1:
        raise RewardError(f"'{text}' names {len(configs)} rewards; `unirg rewards check` takes one")
    try:
        with within(timeout * LONGER, f"the set-up of '{text}'"):
            reward = load_reward(configs[0].name, configs[0].options)
            reward.setup()
    except UserError:
        raise
    except Exception as error:  # whatever the reward's own code raises
        raise RewardError(f"reward '{text}' cannot be set up: {described(error)}") from error
    findings = check_contract(_Limited(**vars(reward), timeout=timeout))
    for finding in findings:
        label = "WRONG" if finding.kind == "wrong" else finding.kind
        print(textwrap.fill(finding.text, WIDTH, initial_indent=f"{label:<7}", subsequent_indent=" " * 7))
    wrong = sum(finding.kind == "wrong" for finding in findings)
    print(f"\n{text} {f'breaks the contract: see the {wrong} marked WRONG' if wrong else 'keeps the contract'}.\n")
    print(textwrap.fill(_lesson(configs[0], timeout * LONGER), WIDTH, break_on_hyphens=False))
    return 1 if wrong else 0


def _lesson(config: RewardConfig, timeout: float) -> str:
    """One paragraph: the harmful changes that pay, those that cost next to nothing, the harmless ones that cost."""
    studies = load_phantom(PhantomData(train=STUDIES, reports="complete"), "train")
    try:
        with within(timeout, "scoring them"):
            audit = audit_rewards(config.name, [config], studies, [report_text(study) for study in studies])
    except (UserError, SystemExit) as error:
        return f"What a policy would learn from it cannot be said: {described(error)}"
    (subject,) = audit.subjects
    intro = f"What a policy would learn from it, by changes of {audit.studies} generated reports:"
    own = "`unirg audit --rewards NAME --references FILE` asks the same of your own reports."
    return " ".join([intro, *_sentences(subject), own])


def _sentences(subject: Subject) -> list[str]:
    ranked = subject.ranked()
    if not ranked:
        return ["nothing, for it could judge none of them."]
    base, name = ranked[0]
    best = subject.outcomes[base][name]
    says = next(probe.says for probe in PROBES if probe.name == name)
    best_paid = f"{name} ({says}), {best.difference:+.3f} on average {WHERE[base]}"
    wins = _listed(subject, "wins")
    hardly = [found for found in _listed(subject, "hardly") if found not in wins]
    minded = _listed(subject, "moves")
    if subject.wins:
        others = [found for found in wins if found != name]
        sentences = [f"harm pays. Best paid is {best_paid}, a gain in {best.pays:.0%} of {best.judged}."]
        sentences += [f"It also pays for {', '.join(others)}."] if others else []
    else:
        sentences = [f"no harmful change pays; the cheapest is {best_paid}."]
    if hardly:
        sentences.append(f"Little or nothing is lost by {', '.join(hardly)}: nothing keeps a policy from these.")
    if minded:
        sentences.append(f"Harmless, and yet they move the score: {', '.join(minded)}.")
    return sentences


def _listed(subject: Subject, verdict: Verdict) -> list[str]:
    """The probes with this verdict on either text."""
    return [p.name for p in PROBES if verdict in {subject.outcomes[base][p.name].verdict for base in BASES}]
