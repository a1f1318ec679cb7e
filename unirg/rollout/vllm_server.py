"""vLLM in servers, on other GPUs or nodes: the sampler's end.

Each rank asks for its own studies, one request a study, spread over all servers, and takes each answer as it comes.
Rank 0 pushes the weights to every server. Each push has a name of its own, which the server's workers report with every
answer: a server that was restarted, or that another run has pushed to, cannot answer unnoticed with other weights.

A server that refuses, breaks off, is silent for `timeout` seconds or answers 5xx is left alone; its studies go to the
others. Where none is left, all ranks wait together, ask again with growing pauses, and push the weights to whichever is
back. After `wait` seconds all of them raise the same UserError, which says who waited for whom.

TRL's `VLLMClient` retries in silence, has no time limit, does not know which weights a server has, and transfers over
NCCL alone; its colleague `VLLMGeneration` sends all ranks' images through rank 0 and returns when the last is done.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from queue import Queue
from typing import Any

import torch
from rich.console import Console

from unirg import ranks, signals, watchdog
from unirg.distributed import is_sharded
from unirg.errors import UserError
from unirg.policy import EncodedPrompt, Policy
from unirg.rollout.sampler import Sample, SamplingConfig, VllmConfig
from unirg.rollout.vllm_client import PROBE, Fault, Server
from unirg.rollout.vllm_inputs import (
    PromptInputs,
    architecture,
    check_length,
    check_loaded,
    check_prompt,
    context,
    make_sample,
    model_source,
    require_vllm,
    sampling_parameters,
    vllm_version,
)
from unirg.rollout.weights import WeightStream, named_weights

console = Console()

IN_FLIGHT = 64
"""Requests that a rank has open at once, so that `timeout` is about work and not about waiting for a turn."""
PAUSE = 30.0
"""The longest pause between two tries, in seconds."""

Tensors = Queue[tuple[str, torch.Tensor] | None]


class ServerSampler:
    """Samples with vLLM servers."""

    def __init__(self, policy: Policy, config: VllmConfig, sampling: SamplingConfig) -> None:
        self.policy, self.config = policy, config
        self.dtype = getattr(torch, policy.config.dtype)
        self.tokens = context(policy, sampling.max_new_tokens)
        self.servers = [Server(url) for url in config.servers]
        self.inputs = PromptInputs(policy, _vllm_processor(policy))
        self.run = ranks.everyones(secrets.token_hex(4))[0]
        self.pushes = 0
        self.away: dict[str, str] = {}
        """Why a server is left alone, by its address."""
        self.told: set[str] = set()
        self.asking, self.closed = False, False
        """Whether a round is under way, and whether the sampler was closed: what is left of one asks nobody else."""
        self.heard = time.monotonic()
        """When a server last answered this rank, or it began to ask (a monotonic clock)."""

    @property
    def version(self) -> str:
        return f"{self.run}-{self.pushes}"

    def sync_weights(self) -> None:
        """Pushes the policy's weights as they stand to every server that answers. Those that do not are left alone: a
        `sample` that finds none waits for them. Raises UserError on all ranks where a server does not fit the run."""
        self.pushes += 1
        self._push()
        if ranks.rank() == 0 and self.away and self.away.keys() != self.told:
            servers = "; ".join(f"{url} ({why})" for url, why in self.away.items())
            console.print(f"[yellow]goes on without {servers}[/yellow]", highlight=False, soft_wrap=True)
        self.told = set(self.away)

    def _push(self) -> None:
        """Pushes the current weights to the servers that do not have them, which the ranks share among them: no one
        process, nor one host's network, has to feed them all."""
        lacking: dict[str, int] = {}
        refusals: list[str] = []
        if ranks.rank() == 0:
            try:
                lacking = self._look_around()
            except UserError as error:
                refusals = [str(error)]
        refusals, self.away, lacking = ranks.everyones((refusals, self.away, lacking))[0]
        if lacking and not refusals:
            behind = [server for server in self.servers if server.url in lacking]
            feeders = [i * ranks.world() // len(behind) for i in range(len(behind))]  # far apart: on all hosts
            mine = {s: lacking[s.url] for s, rank in zip(behind, feeders, strict=True) if rank == ranks.rank()}
            try:
                if mine or is_sharded(self.policy.model):
                    self._stream(mine, named_weights(self.policy.model, self.dtype))
            except UserError as error:
                refusals = [str(error)]
            everyones = ranks.everyones((refusals, self.away))
            refusals = [text for own, _ in everyones for text in own]
            self.away = {url: why for _, away in everyones for url, why in away.items()}
        if refusals:
            raise UserError("\n".join(dict.fromkeys(refusals)))

    def _look_around(self) -> dict[str, int]:
        """Asks every server what it is; returns how many workers those have, by address, that lack the current
        weights."""
        self.away = {}
        lacking = {}

        def ask(server: Server) -> list[dict[str, Any]] | Fault:
            try:
                return server.workers("unirg_describe", timeout=min(PROBE, self.config.timeout))
            except Fault as fault:
                return fault

        with ThreadPoolExecutor(len(self.servers)) as pool:
            answers = list(pool.map(ask, self.servers))
        for server, answer in zip(self.servers, answers, strict=True):
            if isinstance(answer, Fault):
                self.away[server.url] = str(answer)
                continue
            self._check(server, answer[0])
            if any(worker["version"] != self.version for worker in answer):
                lacking[server.url] = len(answer)
        return lacking

    def _check(self, server: Server, what: dict[str, Any]) -> None:
        """Raises UserError where the server samples something else than the trainer trains."""
        wanted = {
            "architecture": architecture(self.policy),
            "dtype": self.policy.config.dtype,
            "logprobs_mode": "processed_logprobs",
        }
        if self.inputs.processor is not None:  # films go over as vLLM of one version writes and reads them
            wanted["vllm"] = vllm_version()
        for name, value in wanted.items():
            if what.get(name) != value:
                its = what.get(name, "not known")
                raise UserError(f"{server.url}: its {name} is {its}, and the run needs {value}; start it anew")
        if what["max_model_len"] < self.tokens:
            raise UserError(
                f"{server.url}: takes {what['max_model_len']} tokens, and policy.max_prompt_tokens with the longest "
                f"report that the recipe asks for needs {self.tokens}; start it with --max-model-len {self.tokens}"
            )

    def _stream(self, lacking: dict[Server, int], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Sends the weights to these servers, all at once; a rank that has none takes part in the gathering."""
        queues: list[Tensors] = [Queue(maxsize=2) for _ in lacking]
        streams: list[WeightStream] = []
        with ThreadPoolExecutor(max(1, len(lacking))) as pool:
            sends = {s: pool.submit(self._send, s, n, queue, streams) for (s, n), queue in zip(lacking.items(), queues)}
            try:
                for weight in weights:
                    for queue in queues:
                        queue.put(weight)
                for queue in queues:
                    queue.put(None)
                for server, send in sends.items():
                    try:
                        send.result()
                    except (Fault, OSError) as error:
                        self.away[server.url] = f"weights: {error}"
            except BaseException:  # a signal, for one, which does not wait for a server that stands still
                for server in lacking:
                    server.break_off()
                for stream in streams:
                    stream.break_off()
                for queue in queues:
                    queue.put(None)
                raise

    def _send(self, server: Server, workers: int, tensors: Tensors, streams: list[WeightStream]) -> None:
        """Sends one server what comes out of the queue, up to None, by a stream that it adds to `streams`; and has it
        forget what it computed before: the keys and values of prompts, and the vision tower's features."""
        timeout, more = self.config.timeout, True
        try:
            with (
                closing(WeightStream(server.host, server.port, workers, timeout)) as stream,
                ThreadPoolExecutor(1) as pool,
            ):
                streams.append(stream)
                # Longer than another server may keep this one waiting for its next tensor, or both would be torn.
                where = (*stream.address, stream.token, timeout + 3 * PROBE)
                # It answers when all is there: a time limit on the whole would be one on the model's size.
                fetch = pool.submit(server.workers, "unirg_fetch", *where, timeout=None)
                torn: OSError | None = None
                try:
                    stream.accept(fetch.done)
                    while (tensor := tensors.get()) is not None:
                        stream.write(*tensor)
                    more = False
                    stream.end()
                except OSError as error:
                    torn = error
                    stream.close()  # which its workers notice; their reason is the better one
                try:
                    answers = fetch.result(PROBE if torn else timeout)
                except TimeoutError as error:
                    raise Fault(str(torn) if torn else f"no answer in {timeout:g} s") from error
                finally:
                    server.break_off()
                for answer in answers:
                    check_loaded(answer, server.url)
                for reason in (answer["torn"] for answer in answers if "torn" in answer):
                    raise Fault(reason)
            if not server.post("/reset_prefix_cache?reset_running_requests=true", {}, timeout)["success"]:
                raise Fault("it does not forget its prompts")
            server.post("/reset_encoder_cache", {}, timeout)
            server.workers("unirg_name", self.version, timeout=timeout)  # last: only now it samples what it should
        finally:
            while more and tensors.get() is not None:
                pass

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See `Sampler.sample`. A study's samples finish together. Raises UserError, on all ranks, where servers stay
        away or one read another prompt than the trainer's."""
        if not self.pushes:
            self.sync_weights()
        parameters = [sampling_parameters(self.policy, own, temperature, max_new_tokens) for own in seeds]
        groups: dict[int, list[Sample]] = {}
        keep = _keeper(groups, seeds, temperature, finished)
        self.heard, away_since, pause = time.monotonic(), None, 1.0
        while True:
            left = [i for i in range(len(prompts)) if i not in groups]
            refusal = self._round(prompts, parameters, left, keep)
            now = time.monotonic()
            waiting = [prompts[i].study_id for i in left if i not in groups]
            if away_since is None or self.heard > away_since:
                away_since = now
            over = bool(waiting) and now - away_since >= self.config.wait
            line = self._who_waits(waiting, now - self.heard) if waiting else None
            everyones = ranks.everyones((refusal, line, over))
            if refusals := [text for text, _, _ in everyones if text is not None]:
                raise UserError("\n".join(dict.fromkeys(refusals)))
            lines = [text for _, text, _ in everyones if text is not None]
            if not lines:
                return [groups[i] for i in range(len(prompts))]
            if any(late for _, _, late in everyones):
                raise UserError("\n".join(lines))
            if line is not None:
                console.print(f"[yellow]{line}; asking again[/yellow]", highlight=False, soft_wrap=True)
            _pause(pause)
            pause = min(2 * pause, PAUSE)
            self._push()

    def attempt(
        self,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> Sequence[list[Sample] | None]:
        """See `ApartSampler.attempt`: one try, since weights can be pushed by all ranks together only."""
        parameters = [sampling_parameters(self.policy, own, temperature, max_new_tokens) for own in seeds]
        groups: dict[int, list[Sample]] = {}
        keep = _keeper(groups, seeds, temperature, finished)
        if (refusal := self._round(prompts, parameters, range(len(prompts)), keep)) is not None:
            raise UserError(refusal)
        return [groups.get(i) for i in range(len(prompts))]

    def _who_waits(self, waiting: list[str], seconds: float) -> str:
        servers = "; ".join(f"{url} ({why})" for url, why in self.away.items())
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        return f"rank {ranks.rank()} waited {seconds:.0f} s for {servers}: study {', '.join(waiting[:3])}{more}"

    def _round(
        self,
        prompts: Sequence[EncodedPrompt],
        parameters: Sequence[dict[str, Any]],
        left: Sequence[int],
        keep: Callable[[int, list[Sample]], None],
    ) -> str | None:
        """One try at each of the studies in `left`, kept as they come. Returns why the run must end, if it must."""
        if not left:
            return None
        self.asking = True
        pool = ThreadPoolExecutor(min(IN_FLIGHT, len(left)))
        try:
            asked = {pool.submit(self._group, i, prompts[i], parameters[i]): i for i in left}
            for answered in as_completed(asked):
                if (samples := answered.result()) is not None:
                    keep(asked[answered], samples)
        except UserError as error:
            return str(error)
        finally:  # what is still open here belongs to a round that an error or a signal has ended
            self.asking = False
            pool.shutdown(wait=False, cancel_futures=True)
            for server in self.servers:
                server.break_off()
        return None

    def _group(self, i: int, prompt: EncodedPrompt, parameters: dict[str, Any]) -> list[Sample] | None:
        """A study's samples from the first server that gives them; None where none does."""
        check_length(prompt, parameters["max_tokens"], self.tokens)
        body = self.inputs.request(prompt) | {"sampling_params": parameters}
        for k in range(len(self.servers)):
            server = self.servers[(i + k + ranks.rank()) % len(self.servers)]
            if self.asking and not self.closed and server.url not in self.away:
                try:
                    return self._ask(server, prompt, body)
                except Fault as fault:
                    self.away[server.url] = str(fault)
        return None

    def _ask(self, server: Server, prompt: EncodedPrompt, body: dict[str, Any]) -> list[Sample]:
        try:
            answer = server.post("/inference/v1/generate", body, self.config.timeout)
        except UserError as error:
            raise UserError(f"study {prompt.study_id}: {error}") from error
        check_prompt(prompt, answer.get("prompt_token_ids"), server.url)
        # After the answer: only `_push` gives a server this name, and none runs meanwhile, so it had it all along.
        if any(has["version"] != self.version for has in server.workers("unirg_describe", timeout=self.config.timeout)):
            raise Fault("it has other weights than it was sent: restarted, or in use by another run")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != body["sampling_params"]["n"] or not all(choice["token_ids"] for choice in choices):
            raise Fault(f"answered {len(choices)} of {body['sampling_params']['n']} reports of study {prompt.study_id}")
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise Fault(f"broke off reports of study {prompt.study_id}")  # as one that is told to end does, with 200
        self.heard = time.monotonic()
        return [
            make_sample(self.policy, choice["token_ids"], [at["logprob"] for at in choice["logprobs"]["content"]])
            for choice in choices
        ]

    def close(self) -> None:
        """Breaks off what is still open; the servers stay up."""
        self.closed = True
        for server in self.servers:
            server.break_off()


def _keeper(
    groups: dict[int, list[Sample]],
    seeds: Sequence[Sequence[int]],
    temperature: float,
    finished: Callable[[int, int, Sample], None] | None,
) -> Callable[[int, list[Sample]], None]:
    """Puts a study's samples into `groups` and tells of each; greedy, one was asked for and stands for all."""

    def keep(i: int, samples: list[Sample]) -> None:
        groups[i] = samples * (1 if temperature else len(seeds[i]))
        for g, sample in enumerate(groups[i] if finished is not None else ()):
            finished(i, g, sample)  # type: ignore[misc]

    return keep


def _pause(seconds: float) -> None:
    """Waits, then for the other ranks to be there too. Raises signals.Stopped on all where any was asked to stop: ranks
    that hear a signal only where they meet would wait on, and be killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals.asked():
        time.sleep(0.1)
        watchdog.goes_on()
    if number := ranks.largest(signals.asked()):
        raise signals.Stopped(number)


def _vllm_processor(policy: Policy) -> Any | None:
    """vLLM's own processor for the policy's model; None where prompts have no images. Raises UserError where vLLM,
    which the trainer needs for nothing else, is not installed."""
    if not (policy.reads_images and policy.prompt.images):
        return None
    require_vllm()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    trusted = policy.config.trust_remote_code
    with torch.random.fork_rng(devices=[]), model_source(policy) as source:
        arguments = EngineArgs(model=source, dtype=policy.config.dtype, trust_remote_code=trusted)
        return MULTIMODAL_REGISTRY.create_processor(arguments.create_model_config())
