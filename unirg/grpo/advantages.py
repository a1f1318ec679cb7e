"""Scores of the G reports of each study -> one advantage per report.

Shape suffixes: N reports in the whole optimisation step (all ranks), the G reports of a study side by side; R rewards;
S studies (groups), N = S * G.

The formulas are those of TRL 1.16's `GRPOTrainer`: GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2), without the
division by the standard deviation (Dr. GRPO, arXiv 2503.20783, section 3.2), and GDPO (arXiv 2601.05242), which
normalises each reward before they are summed. They differ from TRL's in two places, both stated at `advantages`:
reports that cannot be judged, and groups whose rewards differ by rounding alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sum_then_normalise", "normalise_then_sum"]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4  # TRL's, added to every standard deviation before dividing by it
NOISE = 1e-6  # a standard deviation below this, relative to rewards of size 1 or more, is rounding


@dataclass(frozen=True)
class AdvantageResult:
    """What `advantages` returns; N reports, in the order of the scores.

    `advantages_N`: float32, 0 where a report is masked. `rewards_N`: float32, the weighted sum of the rewards, NaN
    where masked. `mask_N`: bool, True where the report was judged and counts in the loss. `zero_variance_groups`:
    groups that teach nothing, because all of their judged reports have one reward, or fewer than two were judged; of
    `groups`.
    """

    advantages_N: Tensor
    rewards_N: Tensor
    mask_N: Tensor
    zero_variance_groups: int
    groups: int


def advantages(
    scores: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    group_size: int,
    aggregation: Aggregation = "sum_then_normalise",
    scale: Scale = "group",
) -> AdvantageResult:
    """Group-relative advantages of N reports from their scores by R rewards.

    Args:
        scores: label of a reward -> N scores, the `group_size` reports of each study adjacent. None, NaN and infinities
            mean "cannot be judged".
        weights: label -> weight, for exactly the labels of `scores`. A weight of 0 means: logged only.
        group_size: G, the number of reports per study.
        aggregation: `sum_then_normalise` (GRPO) normalises the weighted sum; `normalise_then_sum` (GDPO) normalises
            each reward within its group, sums with the weights, and normalises the sums over the step; `scale` is then
            unused.
        scale: what the centred sum is divided by: the standard deviation of its `group`, of the whole `batch`, or
            nothing (`none`).

    Masking: a report that no reward (of non-zero weight) could judge is masked: advantage 0, and it enters no mean, no
    standard deviation and, through `mask_N`, no sample count. A report that lacks only some rewards has a sum that is
    not comparable with its group's: TRL takes the missing reward as 0, which punishes the report (or, for a penalty,
    rewards it) for a failed judge. `sum_then_normalise` therefore masks a report that lacks a reward some other report
    of its group has; a reward that the whole group lacks is left out for that group. `normalise_then_sum` needs no such
    care: a missing reward contributes 0, which is the group's mean.

    Rounding: rewards that are equal in exact arithmetic may differ in the last bits, and dividing by their standard
    deviation makes a signal of it (GDPO's two normalisations bring noise of 1e-8 to advantages near 0.5; NeMo-RL met
    advantages of 2,000 that way, NVIDIA-NeMo/RL pull request 4158). A group with a standard deviation below 1e-6
    (relative to its largest reward, if that exceeds 1) has advantage 0.

    Raises ValueError, naming the label, where labels, lengths or the group size do not fit.
    """
    scores_NR, weights_R = _matrix(scores, weights, group_size)
    scores_SGR = scores_NR.view(-1, group_size, len(weights_R))
    if aggregation == "sum_then_normalise":
        missing_SGR = scores_SGR.isnan()
        lacks_SGR = missing_SGR & ~missing_SGR.all(dim=1, keepdim=True)  # a group-mate has what this report lacks
        masked_SG = lacks_SGR.any(dim=2) | missing_SGR.all(dim=2)
        rewards_SG = (scores_SGR * weights_R).nansum(dim=2).masked_fill(masked_SG, torch.nan)
        centred_SG, std_S1 = _centre(rewards_SG, dim=1)
        varies_S1 = std_S1 > 0
        if scale == "group":
            advantages_SG = centred_SG / (std_S1 + EPSILON)
        elif scale == "batch":
            advantages_SG = centred_SG / (_centre(rewards_SG.flatten(), dim=0)[1] + EPSILON)
        elif scale == "none":
            advantages_SG = centred_SG
        else:
            raise ValueError(f"scale is {scale!r}; expected 'group', 'batch' or 'none'")
    elif aggregation == "normalise_then_sum":
        masked_SG = scores_SGR.isnan().all(dim=2)
        rewards_SG = (scores_SGR * weights_R).nansum(dim=2).masked_fill(masked_SG, torch.nan)
        centred_SGR, std_S1R = _centre(scores_SGR, dim=1)
        varies_S1 = (std_S1R > 0).any(dim=2)
        sums_SG = (centred_SGR / (std_S1R + EPSILON) * weights_R).nansum(dim=2).masked_fill(masked_SG, torch.nan)
        centred_N, std_1 = _centre(sums_SG.flatten(), dim=0)
        advantages_SG = (centred_N / (std_1 + EPSILON)).view(-1, group_size)
    else:
        raise ValueError(f"aggregation is {aggregation!r}; expected 'sum_then_normalise' or 'normalise_then_sum'")
    advantages_SG = advantages_SG.masked_fill(masked_SG | ~varies_S1, 0.0)
    return AdvantageResult(
        advantages_N=advantages_SG.flatten().float(),
        rewards_N=rewards_SG.flatten().float(),
        mask_N=~masked_SG.flatten(),
        zero_variance_groups=int((~varies_S1).sum()),
        groups=len(scores_SGR),
    )


def _matrix(
    scores: Mapping[str, Sequence[float | None]], weights: Mapping[str, float], group_size: int
) -> tuple[Tensor, Tensor]:
    """Scores as float64 (N, R) with NaN for what is missing, and weights (R,), of the rewards with non-zero weight."""
    if set(scores) != set(weights):
        raise ValueError(f"scores are for {sorted(scores)}, weights for {sorted(weights)}; expected the same labels")
    labels = [label for label, weight in weights.items() if weight != 0]
    if not labels:
        raise ValueError(f"every weight of {sorted(weights)} is 0; give at least one reward a weight")
    lengths = {label: len(scores[label]) for label in scores}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"rewards returned different numbers of scores: {lengths}")
    count = lengths[labels[0]]
    if group_size < 1 or count == 0 or count % group_size:
        raise ValueError(f"{count} scores cannot be split into groups of {group_size}")
    columns = [[torch.nan if x is None else float(x) for x in scores[label]] for label in labels]
    scores_NR = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    scores_NR = scores_NR.masked_fill(scores_NR.isinf(), torch.nan)
    return scores_NR, torch.tensor([weights[label] for label in labels], dtype=torch.float64)


def _centre(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`values` less their mean along `dim`, and their sample standard deviation (Bessel's n - 1), both without NaNs.

    The standard deviation keeps `dim`; it is exactly 0 for rounding noise and for fewer than two values.
    """
    count = (~values.isnan()).sum(dim, keepdim=True)
    centred = values - values.nanmean(dim, keepdim=True)
    std = (centred.square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    size = values.nan_to_num(nan=0.0).abs().amax(dim, keepdim=True).clamp(min=1.0)
    return centred, std.masked_fill((count < 2) | (std <= NOISE * size), 0.0)


def most_extreme(advantages_N: Tensor, group_size: int, keep: int) -> Tensor:
    """Indices (S * keep, ascending, int64) of the `keep` reports of each group that vary most; train on these alone.

    Max-variance down-sampling (PODS, arXiv 2504.13818): the subset of largest variance is
    always some of the highest together with some of the lowest, so `keep` + 1 candidates are enough. Of equals the
    earlier report is kept. Raises ValueError where `keep` or the group size does not fit.
    """
    count = len(advantages_N)
    if group_size < 1 or count % group_size:
        raise ValueError(f"{count} advantages cannot be split into groups of {group_size}")
    if not 1 <= keep <= group_size:
        raise ValueError(f"keep is {keep}; expected between 1 and the group size, {group_size}")
    chosen = []
    for start, group in zip(range(0, count, group_size), advantages_N.double().view(-1, group_size), strict=True):
        order = torch.argsort(group, descending=True, stable=True)
        subsets = [torch.cat([order[: keep - low], order[group_size - low :]]) for low in range(keep + 1)]
        variances = torch.stack([group[subset].var(correction=0) for subset in subsets])
        chosen.append(start + subsets[int(variances.argmax())].sort().values)
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
