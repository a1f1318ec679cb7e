"""The policy loss: clipped importance ratios times advantages, plus a KL term, and the log-probs it is made of.

Shape suffixes: B reports in a micro-batch, T positions of the longest of them, V vocabulary, K = B * T positions.

Everything that divides is a number of the whole optimisation step (`Normaliser`), so that the losses, gradients and
metrics of micro-batches and ranks simply add up: one micro-batch and several give the same step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unirg.section import Section

CHUNK_ELEMENTS = 2**24  # logits turned to float32 at a time: 64 MB, far below a batch's at a vocabulary of 150,000


class LossConfig(Section):
    """How advantages become a loss."""

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """`grpo`: mean over each report's tokens, then over reports (arXiv 2402.03300). `dr_grpo`: sum over tokens divided
    by the longest report allowed, so that length is neither rewarded nor punished (arXiv 2503.20783). `dapo`: mean over
    all tokens of the step (arXiv 2503.14476). `gspo`: one ratio per report, the geometric mean of its tokens', with
    `grpo`'s normalisation (arXiv 2507.18071); it wants clips near 3e-4 and 4e-4."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The ratio new / old policy is clipped below 1 - clip_low."""
    clip_high: float | None = Field(default=None, ge=0)
    """The ratio is clipped above 1 + clip_high; unset means clip_low. DAPO's clip-higher is 0.28."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference policy (beta). 0: no reference policy is needed."""
    correction: Literal["none", "truncate", "mask"] = "mask"
    """What is done about a sampler whose probabilities differ from the trainer's: nothing, weigh by their ratio
    truncated at `correction_cap`, or weigh by the ratio and leave out what lies above the cap."""
    correction_level: Literal["token", "sequence"] = "sequence"
    """One ratio per token, or their product over the report."""
    correction_cap: float = Field(default=3.0, ge=1)
    """The largest ratio trainer / sampler let through."""


@dataclass(frozen=True)
class Normaliser:
    """Counts over the whole optimisation step: every micro-batch on every rank.

    `samples`: reports with at least one active token (judged, not masked). `tokens`: active tokens.
    `max_completion_length`: the longest report allowed, in tokens; `dr_grpo` alone reads it.
    """

    samples: float
    tokens: float
    max_completion_length: int


@dataclass(frozen=True)
class LossResult:
    """`loss`: 0-d, to call backward on. `metrics`: 0-d detached tensors under TRL's names.

    Loss and metrics are this micro-batch's share: summed over the step's micro-batches and ranks they give the step's
    loss and the step's means. Engines that average gradients over ranks need the loss times the world size.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def grpo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor | None,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    config: LossConfig,
    normaliser: Normaliser,
    reference_logps_BT: Tensor | None = None,
    sampler_weights: Tensor | None = None,
    entropies_BT: Tensor | None = None,
) -> LossResult:
    """The loss of one micro-batch; equal to that of TRL 1.16's `GRPOTrainer._compute_loss` for the kinds it has.

    Args:
        logps_BT: log-probs of the sampled tokens under the policy, with gradient.
        old_logps_BT: under the policy that sampled; None if it has not moved since (the ratio is then 1).
        mask_BT: bool or 0/1, true on the report's tokens; a masked report's row is all false. Nothing at other
            positions reaches the loss, be it NaN.
        advantages_B: one per report.
        normaliser: counts over the whole step.
        reference_logps_BT: under the reference policy; needed where `config.kl` is not 0.
        sampler_weights: (B, T) or (B, 1), of `sampler_correction`; multiplies the policy term, not the KL term.
        entropies_BT: in nats, for the metric alone.

    Metrics: `clip_ratio/low_mean`, `high_mean` and `region_mean` (share of tokens, for `gspo` of reports, whose
    gradient the clip removes), `kl` if there is a reference (k3 estimator, http://joschu.net/blog/kl-approx.html, times
    the ratio, TRL's default `use_bias_correction_kl`), `entropy`. A step without an active token has loss 0.

    Raises ValueError if `config.kl` is not 0 and there is no reference.
    """
    if config.kl and reference_logps_BT is None:
        raise ValueError(f"the loss has kl={config.kl} but there are no log-probs of a reference policy")
    mask_BT = mask_BT.bool()
    samples, tokens = max(normaliser.samples, 1), max(normaliser.tokens, 1)
    lengths_B1 = mask_BT.sum(dim=1, keepdim=True)
    advantages_B1 = advantages_B.to(logps_BT).unsqueeze(1)
    old_logps_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT
    log_ratio = (logps_BT - old_logps_BT).masked_fill(~mask_BT, 0.0)  # (B, T); for gspo (B, 1)
    if config.kind == "gspo":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / lengths_B1.clamp(min=1)
    low, high = 1 - config.clip_low, 1 + (config.clip_low if config.clip_high is None else config.clip_high)
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantages_B1, ratio.clamp(low, high) * advantages_B1)
    if sampler_weights is not None:
        objective = objective * sampler_weights.detach()
    loss_BT = -objective.expand_as(logps_BT)

    metrics = {}
    if reference_logps_BT is not None:
        difference_BT = (reference_logps_BT - logps_BT).masked_fill(~mask_BT, 0.0)
        # The ratio weighs the estimate as it weighs the reward. Without it the gradient of k3 is not that of the KL;
        # with it, it is (log pi - log pi_ref) d log pi on-policy, the reverse KL's (DeepSeek-V3.2, arXiv 2512.02556).
        kl_BT = ratio * (difference_BT.exp() - difference_BT - 1)
        metrics["kl"] = kl_BT.sum() / tokens
        if config.kl:
            loss_BT = loss_BT + config.kl * kl_BT

    loss_BT = loss_BT.masked_fill(~mask_BT, 0.0)
    if config.kind in ("grpo", "gspo"):
        loss = (loss_BT / lengths_B1.clamp(min=1)).sum() / samples
    elif config.kind == "dr_grpo":
        loss = loss_BT.sum() / (samples * normaliser.max_completion_length)
    else:
        loss = loss_BT.sum() / tokens

    counted = lengths_B1 > 0 if config.kind == "gspo" else mask_BT
    total = samples if config.kind == "gspo" else tokens
    clipped_low = (ratio < low) & (advantages_B1 < 0) & counted
    clipped_high = (ratio > high) & (advantages_B1 > 0) & counted
    metrics["clip_ratio/low_mean"] = clipped_low.sum() / total
    metrics["clip_ratio/high_mean"] = clipped_high.sum() / total
    metrics["clip_ratio/region_mean"] = (clipped_low | clipped_high).sum() / total
    if entropies_BT is not None:
        metrics["entropy"] = entropies_BT.masked_fill(~mask_BT, 0.0).sum() / tokens
    return LossResult(loss, {name: value.detach() for name, value in metrics.items()})


@torch.no_grad()
def sampler_correction(
    logps_BT: Tensor,
    sampler_logps_BT: Tensor,
    mask_BT: Tensor,
    mode: Literal["none", "truncate", "mask"] = "mask",
    level: Literal["token", "sequence"] = "sequence",
    cap: float = 3.0,
) -> Tensor:
    """Importance weights trainer / sampler, (B, T) per token or (B, 1) per sequence, without gradient.

    A sampling engine's probabilities differ from the trainer's (kernels, precision), so its samples are off-policy.
    `truncate` takes min(ratio, cap); `mask` takes the ratio where it is at most `cap` and 0 above it; `none` gives
    ones. As TRL 1.16's `vllm_importance_sampling_correction`. `logps_BT` is of the policy at sampling time. A token
    without a sampler's log-prob (NaN) gets the difference 0.
    """
    difference = (logps_BT - sampler_logps_BT).masked_fill(~mask_BT.bool(), 0.0).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    ratio = difference.exp()
    if mode == "truncate":
        return ratio.clamp(max=cap)
    if mode == "mask":
        return ratio.masked_fill(ratio > cap, 0.0)
    return torch.ones_like(ratio)


@torch.no_grad()
def sampler_metrics(weights: Tensor, logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """How far the sampler is from the trainer, under TRL's names; 0-d tensors, 0 where no token is active.

    `sampling/importance_sampling_ratio/{min,mean,max}` of the weights that `sampler_correction` gave, and
    `sampling/sampling_logp_difference/{mean,max}` of the absolute difference in nats, over these reports.
    """
    mask_BT = mask_BT.bool()
    difference = (logps_BT - sampler_logps_BT).abs()[mask_BT & ~sampler_logps_BT.isnan()]
    ratio = weights[mask_BT] if weights.shape == mask_BT.shape else weights[mask_BT.any(dim=1)].flatten()
    zero = logps_BT.new_zeros(1)
    ratio, difference = (x if x.numel() else zero for x in (ratio, difference))
    return {
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
    }


def logps_and_entropy(
    logits_BTV: Tensor, ids_BT: Tensor, temperature: float = 1.0, banned_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Log-probs of `ids_BT` (with gradient) and entropies in nats (without), both float32 (B, T).

    Args:
        logits_BTV: logits at the positions that predict `ids_BT`, in any float type.
        temperature: the one that the reports were sampled at; the logits are divided by it.
        banned_ids: tokens that the sampler cannot emit (image and video placeholders); they leave the softmax. A banned
            id in `ids_BT` gets the most negative float, which is no probability: mask such positions.

    Only a chunk of the rows is ever held in float32, forward and backward; the gradient is the one tensor of the
    logits' size that is allocated. Leading dimensions may be any that `ids_BT` shares with the logits.

    Raises ValueError if the temperature is not positive (sampling greedily gives no distribution to learn from).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0")
    banned = torch.tensor(sorted(set(banned_ids)), dtype=torch.int64, device=logits_BTV.device)
    logps_K, entropies_K = _LogpsAndEntropy.apply(
        logits_BTV.reshape(-1, logits_BTV.shape[-1]), ids_BT.reshape(-1), temperature, banned
    )
    return logps_K.view(ids_BT.shape), entropies_K.view(ids_BT.shape)


def _scaled(logits: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """A chunk of rows in at least float32, divided by the temperature, banned tokens at the lowest finite value."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.index_fill_(1, banned, torch.finfo(scaled.dtype).min) if len(banned) else scaled


class _LogpsAndEntropy(torch.autograd.Function):
    """log softmax at one index, and entropy, of each row; the backward recomputes the softmax chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits_KV: Tensor, ids_K: Tensor, temperature: float, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, CHUNK_ELEMENTS // logits_KV.shape[-1])
        logps, entropies = [], []
        for chunk, ids in zip(logits_KV.split(rows), ids_K.split(rows), strict=True):
            scaled = _scaled(chunk, temperature, banned)
            normaliser = scaled.logsumexp(dim=1)
            logps.append(scaled.gather(1, ids.unsqueeze(1)).squeeze(1) - normaliser)
            probabilities = (scaled - normaliser.unsqueeze(1)).exp_()
            entropies.append(normaliser - probabilities.mul_(scaled).sum(dim=1))
        ctx.save_for_backward(logits_KV, ids_K, banned)
        ctx.temperature, ctx.rows = temperature, rows
        entropies_K = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_K)
        return torch.cat(logps), entropies_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_KV, ids_K, banned = ctx.saved_tensors
        gradient_KV = torch.empty_like(logits_KV)
        pieces = (x.split(ctx.rows) for x in (logits_KV, gradient_KV, ids_K, grads[0] / ctx.temperature))
        for chunk, gradient, ids, grad in zip(*pieces, strict=True):
            # d logp / d logit = (one-hot - softmax) / temperature
            softmax = _scaled(chunk, ctx.temperature, banned).softmax(dim=1)
            softmax.mul_(-grad.unsqueeze(1)).scatter_add_(1, ids.unsqueeze(1), grad.unsqueeze(1))
            gradient.copy_(softmax)
        return gradient_KV, None, None, None
