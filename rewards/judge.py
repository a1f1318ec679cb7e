"""What rewards that ask a language model have in common: `judge_errors` and `green`.

Both show a judge the reference and the candidate, read whole numbers from its answer, and turn them into a score. A
judge that fails (no answer, a malformed one, the spending limit) masks the sample: it never scores it.
"""

import os
import random
import re
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from unirg.scoring.contract import RewardError

from .judge_cache import JudgeCache, answer_key
from .judge_endpoint import Answer, Failed, ask, checked_url

LONGEST_REPORT = 10_000  # characters, some 1,500 words: what is longer is no report, and would only cost
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
ANOTHER_TEMPERATURE = 0.5  # of the question after a malformed answer, which at 0 would come again

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(kw_only=True)
class Judge:
    """An OpenAI-compatible endpoint, asked about pairs of reports. Its fields are the reward's options.

    A reward built on it supplies `wording`, `messages`, `counts` and `value`.

    Raises ValueError where an option is wrong, RewardError where the API key is missing or the cache cannot be used.
    """

    base_url: str
    """The endpoint, e.g. http://127.0.0.1:8000/v1."""
    model: str
    """The judge's name at the endpoint. Give every judge a name of its own: the cache knows it by that name."""
    allow_remote: bool = False
    """Whether reports may be sent to another machine."""
    api_key_env: str | None = None
    """The environment variable that holds the API key, where the endpoint wants one."""
    concurrency: int = 8
    """Requests under way at once, in this process."""
    attempts: int = 4
    """How often a pair is asked about at most, failures and malformed answers together."""
    request_timeout: float = 120.0
    """Seconds to wait for one answer."""
    answer_tokens: int = 1024
    """The longest answer."""
    request: dict[str, Any] | None = None
    """Further fields of the request's body, such as `{chat_template_kwargs: {enable_thinking: false}}`; null takes a
    field out that the endpoint refuses."""
    cache: str = "~/.cache/unirg/judge.sqlite"
    """The file of answers. Several processes may share it; it holds hashes and counts, no text."""
    max_requests: int | None = None
    """The most requests of a run, retries included."""
    max_tokens: int | None = None
    """The most tokens of a run, questions and answers together; requests under way may pass it."""
    at_limit: str = "mask"
    """What happens at a limit: samples are masked, or the scoring raises."""
    run: str = ""
    """The name under which the cache's file counts requests and tokens, e.g. ${name}: a run that goes on, and every
    process of it, spend from one limit."""

    _cache: JudgeCache | None = field(default=None, init=False, repr=False)
    _key: str | None = field(default=None, init=False, repr=False)
    _answered: bool = field(default=False, init=False, repr=False)
    _unanswered: int = field(default=0, init=False, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self._url = checked_url(self.base_url, self.allow_remote)
        for name in ("concurrency", "attempts", "answer_tokens", "request_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.at_limit not in ("mask", "raise"):
            raise ValueError(f"at_limit '{self.at_limit}' is neither mask nor raise")
        if not self.run and (self.max_requests is not None or self.max_tokens is not None):
            raise ValueError("a spending limit is counted by run; give `run` a name, e.g. ${name}")
        self._slots = threading.BoundedSemaphore(self.concurrency)

    @property
    def wording(self) -> str:
        """All of the question but the reports, and how the answer is read. Another wording is another cache entry."""
        raise NotImplementedError

    def messages(self, reference: str, candidate: str) -> list[dict[str, str]]:
        """The chat to send about a pair."""
        raise NotImplementedError

    def counts(self, text: str) -> list[int] | None:
        """The numbers in an answer; None where it is malformed."""
        raise NotImplementedError

    def value(self, counts: list[int]) -> float:
        """The score of these numbers."""
        raise NotImplementedError

    @property
    def version(self) -> str:
        """A short hash of the wording and of the request's settings."""
        return answer_key(self.wording, repr(sorted(self._settings().items())))[:12]

    @property
    def identity(self) -> dict[str, Any]:
        """Judge, endpoint and version of the question."""
        return {"judge": self.model, "endpoint": self.base_url, "question": self.version}

    def setup(self) -> None:
        """Read the API key and open the cache."""
        if self.api_key_env:
            self._key = os.environ.get(self.api_key_env, "").strip()  # a key read from a file ends in a new line
            if not self._key:
                raise RewardError(f"the judge's API key is missing: set the environment variable {self.api_key_env}")
            if not (self._key.isascii() and self._key.isprintable()):  # said here, where the key is not quoted
                raise RewardError(f"the environment variable {self.api_key_env} holds no API key: odd characters")
        self._cache = self._cache or JudgeCache(self.cache)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """One number in [0, 1] per candidate, None where the judge failed or the reference is blank. A blank candidate,
        and one of more than `LONGEST_REPORT` characters, scores 0 unasked."""
        pairs = list(zip(references, candidates, strict=True))
        asked = dict.fromkeys(pair for pair in pairs if pair[0].strip() and _may_be_a_report(pair[1]))
        found = dict(zip(asked, self.judged(list(asked)), strict=True))
        scores: list[float | None] = []
        for pair in pairs:
            counts = found.get(pair)
            if pair in found:
                scores.append(None if counts is None else self.value(counts))
            else:
                scores.append(0.0 if pair[0].strip() else None)
        return scores

    def judged(self, pairs: Sequence[tuple[str, str]]) -> list[list[int] | None]:
        """The judge's numbers for each (reference, candidate), from the cache or by asking; None where it failed.

        Raises RewardError: key, model or URL are refused before anything was ever answered, the cache cannot be used,
        or a limit is reached with `at_limit: raise`. Where the endpoint fails `concurrency` pairs in a row, the rest of
        the call is masked unasked: a dead judge must not hold up every step for hours.
        """
        if self._cache is None:
            self.setup()
        self._unanswered = 0
        over = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = [pool.submit(self._pair, reference, candidate, over) for reference, candidate in pairs]
            try:
                return [answer.result() for answer in answers]
            except BaseException:
                over.set()  # those that wait give up, and those not begun never begin
                raise

    def _pair(self, reference: str, candidate: str, over: threading.Event) -> list[int] | None:
        assert self._cache is not None
        key = answer_key(self.model, self.version, reference, candidate)
        if (known := self._cache.answer(key)) is not None:
            return known
        messages = self.messages(_harmless(reference), _harmless(candidate))
        why, unanswered, temperature = "", False, 0.0
        for attempt in range(self.attempts):
            if over.is_set() or not self._may_spend():
                return None
            try:
                answer = self._asked(messages, temperature)
            except Failed as failure:
                why, unanswered = str(failure), failure.again
                if failure.setting and not self._answered:
                    raise RewardError(
                        f"the judge's endpoint {self.base_url} refuses model '{self.model}' ({why}); check `base_url`, "
                        "`model` and `api_key_env`"
                    ) from None
                if not failure.again:
                    break
                if attempt + 1 < self.attempts:
                    over.wait(_pause(attempt, failure.wait))
                continue
            self._answered, self._unanswered, unanswered = True, 0, False
            self._cache.add_tokens(self.run, answer.tokens)
            if (counts := self.counts(_THOUGHTS.sub("", answer.text).strip())) is not None:
                self._cache.store(key, counts)
                return counts
            why, temperature = "a malformed answer", ANOTHER_TEMPERATURE
        if unanswered:
            self._unanswered += 1
            if self._unanswered >= self.concurrency:
                over.set()
        self._say(why, f"the judge {self.model} failed on a sample ({why}), which is masked, as are others like it")
        return None

    def _asked(self, messages: list[dict[str, str]], temperature: float) -> Answer:
        body = {"model": self.model, "messages": messages} | self._settings(temperature)
        with self._slots:
            return ask(self._url, body, self._key, self.request_timeout)

    def _settings(self, temperature: float = 0.0) -> dict[str, Any]:
        settings = {"temperature": temperature, "max_tokens": self.answer_tokens} | (self.request or {})
        return {name: value for name, value in settings.items() if value is not None}

    def _may_spend(self) -> bool:
        assert self._cache is not None
        if self._cache.reserve(self.run, self.max_requests, self.max_tokens):
            return True
        requests, tokens = self._cache.spent(self.run)
        reached = f"run '{self.run}' has spent its judge's limit ({requests} requests, {tokens} tokens)"
        if self.at_limit == "raise":
            raise RewardError(f"{reached}; raise `max_requests` or `max_tokens` to go on")
        self._say("limit", f"{reached}: from here on samples that are not in the cache are masked")
        return False

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _may_be_a_report(candidate: str) -> bool:
    return bool(candidate.strip()) and len(candidate) <= LONGEST_REPORT


def _harmless(report: str) -> str:
    """The report with a space behind `<` and `[`, so that none of it is read as a control token (`<|im_end|>`,
    `[INST]`), which a server would do inside a message too; what no UTF-8 can hold becomes `?`."""
    return re.sub(r"([<\[])(?=\S)", r"\1 ", report).encode(errors="replace").decode()


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt: twice as long each time, half of it by chance, never less than was asked for."""
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
    return min(LONGEST_WAIT_S, max(asked or 0.0, longest * (0.5 + random.random() / 2)))
