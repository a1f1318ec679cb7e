"""What a rollout engine is: prompts and per-request seeds in, samples with log-probs out."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from unirg.section import Section
from unirg.study import Study

if TYPE_CHECKING:
    from unirg.policy import EncodedPrompt, Policy


class SamplingConfig(Section):
    """How reports are sampled in training. There is no top-p or top-k: they would bias the importance ratio."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature, in sampling and in the log-probs that are trained."""
    max_new_tokens: int = Field(256, gt=0)
    """Length limit of a report in tokens; one that hits it is truncated."""
    rows_per_forward: int = Field(512, gt=0)
    """At most so many reports are decoded at once (whole groups; memory grows with it)."""


@dataclass(frozen=True)
class Sample:
    """One sampled report: token ids (its end-of-turn token included where it came), each token's log-prob under the
    sampler at the sampling temperature, the text, and whether the length limit cut it off."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    truncated: bool


class Sampler(Protocol):
    """A rollout engine."""

    def sample(
        self,
        prompts: "Sequence[EncodedPrompt]",
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """For each prompt as many samples as it has seeds; a sample depends on its prompt, the weights and its seed
        alone, not on what else is in the batch. Temperature 0 is greedy. Each prompt is prefilled once.

        `finished` is called once for each sample, as soon as it is known, with the prompt's place, the seed's and the
        sample."""
        ...


def request_seed(*parts: object) -> int:
    """A 63-bit seed that follows from `parts` alone (run seed, stage, step, study, sample): the same on any rank and
    after any resume."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class GeneratedReport:
    """A report for the study `id`."""

    id: str
    text: str
    truncated: bool


def generate_reports(
    policy: "Policy",
    studies: Sequence[Study],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[GeneratedReport]:
    """One report per study, in order: greedy at temperature 0. `progress` is called with the number done so far."""
    from unirg.rollout.hf import HFSampler

    sampler = HFSampler(policy)
    reports: list[GeneratedReport] = []
    for first in range(0, len(studies), batch_size):
        batch = studies[first : first + batch_size]
        groups = sampler.sample(
            [policy.encode(study) for study in batch],
            [[request_seed(seed, "generate", study.id)] for study in batch],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        reports += [GeneratedReport(s.id, g[0].text, g[0].truncated) for s, g in zip(batch, groups, strict=True)]
        if progress is not None:
            progress(len(reports))
    return reports
