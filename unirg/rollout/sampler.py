"""What a rollout engine is: prompts and per-request seeds in, samples with log-probs out."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from pydantic import Field, model_validator

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

    @model_validator(mode="before")
    @classmethod
    def _plain_softmax(cls, values: Any) -> Any:
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"sampling.{name}: training samples from the plain softmax; with {name} the reports come from "
                    "another distribution than the one whose log-probs are trained, which biases the importance ratio. "
                    "Leave it out"
                )
        return values


class VllmConfig(Section):
    """Where vLLM runs and how long it may be away. It may change when a run goes on."""

    mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: in every rank's process, on its device; `server`: in servers that `unirg rollout-server` started."""
    servers: list[str] = []
    """Their addresses, such as http://10.0.0.7:8000; every rank spreads its studies over all of them."""
    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1)
    """Colocated: the share of the GPU's memory that vLLM takes. On a CPU its cache has as many GiB as the environment
    variable VLLM_CPU_KVCACHE_SPACE says, by default 1."""
    sleep: bool = True
    """Colocated: vLLM gives its memory back while the policy is trained. Needs CUDA, and is off without."""
    timeout: float = Field(300.0, gt=0)
    """Servers: seconds that one study's reports may take before the server counts as hung."""
    wait: float = Field(600.0, ge=0)
    """Servers: seconds that a step waits for a server to come back before the run writes a checkpoint and stops."""

    @model_validator(mode="after")
    def _servers_fit(self) -> "VllmConfig":
        if self.mode == "server" and not self.servers:
            raise ValueError("rollout.vllm.servers: mode server needs the address of at least one")
        if self.mode == "colocate" and self.servers:
            raise ValueError("rollout.vllm.servers: there are none in mode colocate; set rollout.vllm.mode=server")
        for url in self.servers:
            try:
                parts = urlsplit(url)
                fits = parts.scheme == "http" and parts.hostname and parts.port and not parts.path.strip("/")
            except ValueError:  # its port is no number
                fits = False
            if not fits:
                raise ValueError(f"rollout.vllm.servers: '{url}' is no address such as http://10.0.0.7:8000")
        if len({url.rstrip("/") for url in self.servers}) < len(self.servers):
            raise ValueError("rollout.vllm.servers: an address is named twice")
        return self


class RolloutConfig(Section):
    """The engine that writes reports: samples in training, and those of evaluations."""

    engine: Literal["hf", "vllm"] = "hf"
    """`hf`: the policy's own model; `vllm`: vLLM, which is faster for large models and gets the weights at every step
    and evaluation."""
    vllm: VllmConfig = VllmConfig()
    """What `engine: vllm` needs."""


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
        An engine may seed a whole group by its first seed.

        `finished` is called once for each sample, as soon as it is known, with the prompt's place, the seed's and the
        sample. Every rank must call it, with no prompts if it has none."""
        ...

    def sync_weights(self) -> None:
        """Makes the following samples those of the policy as it now stands. Every rank must call it."""
        ...

    def close(self) -> None:
        """Ends what the engine holds; it samples no more."""
        ...


@runtime_checkable
class ApartSampler(Sampler, Protocol):
    """An engine with weights of its own, that can sample while the policy is trained."""

    def attempt(
        self,
        prompts: "Sequence[EncodedPrompt]",
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> Sequence[list[Sample] | None]:
        """As `sample`, in any thread, and on one rank without the others; None for a prompt that the engine could not
        serve, which `sample` may then be asked for."""
        ...


def request_seed(*parts: object) -> int:
    """A 63-bit seed that follows from `parts` alone (run seed, stage, step, study, sample): the same on any rank and
    after any resume."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def open_sampler(
    config: RolloutConfig,
    policy: "Policy",
    sampling: SamplingConfig,
    *,
    images: int,
    ranks: int = 1,
    apart: bool = False,
) -> Sampler:
    """The engine that `config` asks for, at work on `policy` until it is closed. It is asked for no longer reports than
    `sampling` says. `images` is the most that a prompt holds, `ranks` how many processes open an engine. `apart`: it
    samples while the policy is trained.

    Raises UserError where the engine is not installed.
    """
    if config.engine == "hf":
        from unirg.rollout.hf import CopySampler, HFSampler

        return (CopySampler if apart else HFSampler)(policy, sampling.rows_per_forward)
    if config.vllm.mode == "server":
        from unirg.rollout.vllm_server import ServerSampler

        return ServerSampler(policy, config.vllm, sampling)
    from unirg.rollout.vllm_colocate import ColocatedSampler

    return ColocatedSampler(policy, config.vllm, sampling, images=images, ranks=ranks)


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
    sampler: Sampler | None = None,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[GeneratedReport]:
    """One report per study, in order: greedy at temperature 0. `sampler` has the weights of `policy`; without one the
    Hugging Face engine writes. `progress` is called with the number done so far."""
    if sampler is None:
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
