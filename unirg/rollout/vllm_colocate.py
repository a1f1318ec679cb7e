"""vLLM in the trainer's process: one engine a rank, which gives its memory back while the policy is trained.

The engine is driven step by step, so that a study's reports go to scoring while others are still being written. TRL's
colocate mode is not used: it waits for the whole batch, sends a request per report where one per study will do, and
leaves no say over precision (vLLM turns float32 into bfloat16 by itself).
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from unirg.errors import UserError
from unirg.policy import EncodedPrompt, Policy
from unirg.rollout.sampler import Sample, SamplingConfig, VllmConfig
from unirg.rollout.vllm_inputs import (
    PromptInputs,
    check_length,
    check_loaded,
    check_prompt,
    context,
    make_sample,
    model_source,
    require_vllm,
    sampling_parameters,
)
from unirg.rollout.vllm_launch import EXTENSION
from unirg.rollout.weights import named_weights

console = Console()


class ColocatedSampler:
    """Samples with a vLLM engine in this process. `images` is the most that a prompt holds; `ranks` how many processes
    have an engine each."""

    def __init__(
        self, policy: Policy, config: VllmConfig, sampling: SamplingConfig, *, images: int, ranks: int = 1
    ) -> None:
        require_vllm()
        from vllm import LLM

        cuda = torch.cuda.is_available()
        self.tokens = context(policy, sampling.max_new_tokens)
        self.policy, self.sleeps, self.asleep, self.filled = policy, config.sleep and cuda, False, False
        if config.sleep and not cuda:
            console.print("rollout.vllm.sleep: needs CUDA, so vLLM keeps its memory here", highlight=False)
        set_threads, threads = torch.set_num_threads, torch.get_num_threads()
        self.brought_up_torch = not torch.distributed.is_initialized()
        with torch.random.fork_rng(devices=[]), model_source(policy) as source:
            llm = LLM(
                source,
                load_format="auto" if policy.base.name_or_path else "dummy",  # both are overwritten
                dtype=policy.config.dtype,
                trust_remote_code=policy.config.trust_remote_code,
                max_model_len=self.tokens,
                max_num_seqs=sampling.rows_per_forward,
                gpu_memory_utilization=config.gpu_memory_utilization,
                limit_mm_per_prompt={"image": max(1, images), "video": 0} if policy.reads_images else {},
                mm_processor_cache_gb=0,  # each prompt comes with its own pixels
                logprobs_mode="processed_logprobs",  # of the softmax that is sampled from
                generation_config="vllm",
                enable_sleep_mode=self.sleeps,
                enforce_eager=not cuda,
                # On a CPU a prompt that is read in parts would end the engine: see vllm_launch.
                enable_chunked_prefill=cuda,
                use_tqdm_on_load=False,
                # Ranks hold an engine each; without this they would build one over all of them.
                distributed_executor_backend="external_launcher" if ranks > 1 else None,
                worker_extension_cls=EXTENSION,
            )
        # vLLM's CPU worker takes both away from its whole process.
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        self.engine: Any = llm.llm_engine
        processor = self.engine.renderer.get_mm_processor() if policy.reads_images else None
        self.inputs = PromptInputs(policy, processor)
        self._sleep()

    def sync_weights(self) -> None:
        """Loads the policy's weights as they stand, and forgets what was computed with those before: the keys and
        values of prompts, and the vision tower's features."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["weights"])
        weights = named_weights(self.policy.model, getattr(torch, self.policy.config.dtype))
        (loaded,) = self.engine.collective_rpc("unirg_load", args=(weights,))
        check_loaded(loaded, "vLLM")
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.engine.reset_prefix_cache()
        self.engine.reset_encoder_cache()
        self.filled = True

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See `Sampler.sample`. A study's samples finish together. Raises UserError, and trains nothing, where vLLM
        read another prompt than the trainer's."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if self.asleep or not self.filled:  # asleep, it has no weights
            self.sync_weights()
        groups: dict[int, list[Sample]] = {}
        device = self.policy.device.type
        # The trainer's autocast is none of vLLM's business, nor are vLLM's draws any of the trainer's.
        with torch.autocast(device, enabled=False), torch.random.fork_rng(devices=[]):
            try:
                for i, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
                    check_length(prompt, max_new_tokens, self.tokens)
                    wanted = sampling_parameters(self.policy, own, temperature, max_new_tokens)
                    parameters = SamplingParams(**wanted, output_kind=RequestOutputKind.FINAL_ONLY)
                    try:
                        self.engine.add_request(str(i), self.inputs.engine_input(prompt), parameters)
                    except ValueError as error:
                        raise UserError(f"study {prompt.study_id}: vLLM does not take its prompt ({error})") from error
                while self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        i = int(output.request_id)
                        check_prompt(prompts[i], output.prompt_token_ids, "vLLM")
                        groups[i] = [
                            make_sample(
                                self.policy,
                                one.token_ids,
                                [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)],
                            )
                            for one in sorted(output.outputs, key=lambda one: one.index)
                        ] * (1 if temperature else len(seeds[i]))
                        if finished is not None:
                            for g, sample in enumerate(groups[i]):
                                finished(i, g, sample)
            finally:
                if left := [str(i) for i in range(len(prompts)) if i not in groups]:
                    self.engine.abort_request(left)
        self._sleep()
        return [groups[i] for i in range(len(prompts))]

    def _sleep(self) -> None:
        if self.sleeps:
            self.engine.sleep(level=2)  # the weights too: they come from the policy again
            self.asleep = True

    def close(self) -> None:
        """Ends the engine, and torch.distributed where the engine began it."""
        from vllm.distributed import parallel_state

        core = self.engine.engine_core
        if self.brought_up_torch:
            core.shutdown()
        else:  # its own end, now or when it is collected, would end the trainer's process group as well
            core._finalizer.detach()
            core.engine_core.model_executor.shutdown()
            core.engine_core.scheduler.shutdown()
            gc.unfreeze()
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD = None  # the next engine may be one process's alone
        del self.engine
