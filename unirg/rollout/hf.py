"""The Hugging Face engine: each study prefilled once, its G answers decoded together on copies of its keys and values.

Shapes: B prompts, P padded prompt length, N rows still decoding, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from unirg.distributed import whole
from unirg.policy import EncodedPrompt, Policy
from unirg.rollout.sampler import Sample

# Finished rows are dropped from the cache when they are this share of it: each drop copies the cache once.
DROP_SHARE = 0.15


class HFSampler:
    """Samples with the policy's own model, in this process."""

    def __init__(self, policy: Policy, rows_per_forward: int = 512) -> None:
        self.policy = policy
        self.rows_per_forward = rows_per_forward
        self.closed = False

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See `Sampler.sample`. Whole groups are decoded together, at most `rows_per_forward` rows at once.

        Sharded weights are whole on every rank meanwhile: all ranks sample together, any number of prompts each.
        """
        model = self.policy.model
        training = model.training
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.eval()
        if checkpointing:  # it switches the key-value cache off
            model.gradient_checkpointing_disable()
        try:
            groups: list[list[Sample]] = []
            first = 0
            with whole(model, self.policy.engine), torch.inference_mode():
                while first < len(prompts):
                    last, rows = first, 0
                    while last < len(prompts) and (last == first or rows + len(seeds[last]) <= self.rows_per_forward):
                        rows += len(seeds[last])
                        last += 1
                    tell = None if finished is None else _shifted(finished, first)
                    groups += self._decode(prompts[first:last], seeds[first:last], temperature, max_new_tokens, tell)
                    first = last
            return groups
        finally:
            model.train(training)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})

    def sync_weights(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    def close(self) -> None:
        """A `sample` under way in another thread raises CancelledError at its next token."""
        self.closed = True

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[Sequence[int]],
        temperature: float,
        max_new_tokens: int,
        finished: Callable[[int, int, Sample], None] | None,
    ) -> list[list[Sample]]:
        policy, device = self.policy, self.policy.device
        logits_BV, cache, mask_BP = self._prefill(prompts)
        # One row per sample: the prompt's keys and values are repeated, its forward is not.
        owner_N = torch.tensor([b for b, group in enumerate(seeds) for _ in group], device=device)
        _keep_rows(cache, owner_N)
        logits_NV, mask_NT = logits_BV[owner_N], mask_BP[owner_N]
        next_N = torch.tensor([prompts[b].next_position for b in owner_N.tolist()], device=device)
        # Uniforms are drawn per request, so that a sample does not depend on who shares its batch.
        uniform_NT = np.stack([np.random.default_rng(seed).random(max_new_tokens) for group in seeds for seed in group])
        row_N = np.arange(len(owner_N))  # which request each row still in the cache belongs to
        ids: list[list[int]] = [[] for _ in row_N]
        logps: list[list[float]] = [[] for _ in row_N]
        alive_N = np.ones(len(row_N), dtype=bool)
        place_N = [(b, g) for b, group in enumerate(seeds) for g in range(len(group))]
        samples: dict[tuple[int, int], Sample] = {}
        mrope = prompts[0].positions_3P is not None
        for step in range(max_new_tokens):
            if self.closed:
                raise CancelledError("the sampler was closed")
            token_N, logp_N = self._draw(logits_NV, uniform_NT[row_N, step], temperature)
            tokens, values = token_N.tolist(), logp_N.tolist()
            for n, request in enumerate(row_N):
                if alive_N[n]:
                    ids[request].append(tokens[n])
                    logps[request].append(values[n])
                    alive_N[n] = tokens[n] not in policy.stop_ids
                    if not alive_N[n] or step + 1 == max_new_tokens:
                        text, place = policy.decode(ids[request]), place_N[request]
                        samples[place] = Sample(tuple(ids[request]), tuple(logps[request]), text, bool(alive_N[n]))
                        if finished is not None:
                            finished(*place, samples[place])
            if not alive_N.any() or step + 1 == max_new_tokens:
                break
            if (~alive_N).mean() >= DROP_SHARE:
                keep_N = torch.from_numpy(np.flatnonzero(alive_N)).to(device)
                _keep_rows(cache, keep_N)
                token_N, mask_NT, next_N = token_N[keep_N], mask_NT[keep_N], next_N[keep_N]
                row_N, alive_N = row_N[alive_N], alive_N[alive_N]
            mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], dim=1)
            position_N1 = (next_N + step)[:, None]
            out = policy.model(
                input_ids=token_N[:, None],
                attention_mask=mask_NT,
                position_ids=position_N1.expand(3, -1, -1) if mrope else position_N1,
                past_key_values=cache,
                use_cache=True,
            )
            logits_NV = out.logits[:, -1]
        return [[samples[b, g] for g in range(len(group))] for b, group in enumerate(seeds)]

    def _prefill(self, prompts: Sequence[EncodedPrompt]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Left-padded prompts through the model once: next-token logits (B, V), the cache, the attention mask (B,
        P)."""
        policy = self.policy
        batch = left_padded(policy, prompts)
        cache = DynamicCache(config=policy.base.config)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in policy.forward_takes else {}
        out = policy.model(
            **batch,
            **policy.image_inputs(prompts, range(len(prompts))),
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        return out.logits[:, -1], cache, batch["attention_mask"]

    def _draw(
        self, logits_NV: torch.Tensor, uniform_N: np.ndarray, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token per row and its log-prob: by inverse CDF of the row's uniform, or the largest at temperature 0."""
        logits_NV = logits_NV.float()
        if self.policy.banned_ids:
            logits_NV[:, list(self.policy.banned_ids)] = float("-inf")
        logps_NV = (logits_NV / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token_N = logits_NV.argmax(-1)
        else:
            cdf_NV = logps_NV.double().exp().cumsum(-1)
            threshold_N1 = torch.from_numpy(uniform_N).to(cdf_NV)[:, None] * cdf_NV[:, -1:]
            token_N = torch.searchsorted(cdf_NV, threshold_N1, right=True)[:, 0].clamp(max=cdf_NV.shape[1] - 1)
        return token_N, logps_NV.gather(1, token_N[:, None])[:, 0]


class CopySampler(HFSampler):
    """Samples with a copy of the policy, which may be trained meanwhile: weights change in the copy where they are
    asked for, and a thread of its own may sample."""

    def __init__(self, policy: Policy, rows_per_forward: int = 512) -> None:
        self.trained = policy.model
        model, processor = copy.deepcopy(policy.model), copy.deepcopy(policy.processor)
        super().__init__(replace(policy, model=model, processor=processor), rows_per_forward)

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copies the weights that can have changed."""
        for own, trained in zip(self.policy.model.parameters(), self.trained.parameters(), strict=True):
            if trained.requires_grad:
                own.copy_(trained)

    attempt = HFSampler.sample


def _shifted(finished: Callable[[int, int, Sample], None], first: int) -> Callable[[int, int, Sample], None]:
    """`finished` for a part of the prompts, which begins with number `first`."""
    return lambda prompt, seed, sample: finished(first + prompt, seed, sample)


def _keep_rows(cache: Any, rows_N: torch.Tensor) -> None:
    """Makes the cache hold these of its rows, in this order. Unlike `batch_select_indices` this moves the running
    states of linear attention and convolution layers too."""
    cache.reorder_cache(rows_N)


def left_padded(policy: Policy, prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Prompts as one batch, padded on the left: input_ids and attention_mask (B, P), position_ids (3, B, P) or (B,
    P), token_type_ids (B, P) where the model takes them."""
    width = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), width), policy.pad_id)
    mask_BP = torch.zeros(len(prompts), width, dtype=torch.long)
    mrope = prompts[0].positions_3P is not None
    positions_3BP = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BP[row, width - len(prompt) :] = prompt.ids_P
        mask_BP[row, width - len(prompt) :] = 1
        positions = torch.arange(len(prompt)) if prompt.positions_3P is None else prompt.positions_3P
        positions_3BP[:, row, width - len(prompt) :] = positions
    batch = {
        "input_ids": ids_BP,
        "attention_mask": mask_BP,
        "position_ids": positions_3BP if mrope else positions_3BP[0],
    }
    # Gemma: image tokens attend to each other both ways. Text models mean other things by types, GPT-2 more embeddings.
    if policy.reads_images and "token_type_ids" in policy.forward_takes:
        batch["token_type_ids"] = torch.zeros_like(ids_BP)
        for row, prompt in enumerate(prompts):
            if prompt.types_P is not None:
                batch["token_type_ids"][row, width - len(prompt) :] = prompt.types_P
    return {name: tensor.to(policy.device) for name, tensor in batch.items()}
