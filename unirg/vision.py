"""A stage that trains the vision tower alone on finding labels, where no pretrained tower can be had.

Each merged image token votes on every finding; a finding's logit is the log-sum-exp of its votes, so that one token
that sees it is enough (multiple-instance learning). The head is thrown away afterwards.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from unirg.distributed import beside_engine, distribute
from unirg.errors import UserError
from unirg.policy import Policy
from unirg.steps import optimise
from unirg.study import Study
from unirg.training import StageRun


def trainable_tower(policy: Policy) -> nn.Module:
    """The policy's vision tower, which returns merged image tokens as Qwen-VL's do. Raises UserError where it has
    none."""
    model = policy.base
    if not hasattr(getattr(model, "model", None), "visual"):
        why = "has none" if policy.reads_images else "reads text only"
        raise UserError(f"a vision stage needs a tower of the Qwen-VL kind, and {type(model).__name__} {why}")
    return model.model.visual


class Probe(nn.Module):
    """The tower with a linear head over `labels`; logits (B, L) of studies with one or more images each."""

    def __init__(self, policy: Policy, labels: list[str]) -> None:
        super().__init__()
        self.labels = labels
        self.tower: Any = trainable_tower(policy)
        width = policy.base.config.vision_config.out_hidden_size
        self.head = nn.Linear(width, len(labels))
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.constant_(self.head.bias, -3.0)  # findings are rare; log-sum-exp over tokens adds to it

    def forward(self, pixels: torch.Tensor, grids: torch.Tensor, images: list[int]) -> torch.Tensor:
        """`images[b]`: how many of the images, in order, belong to study b."""
        out = self.tower(pixels, grid_thw=grids, return_dict=True)
        merge = self.tower.spatial_merge_size**2
        tokens = (grids.prod(-1) // merge).tolist()
        first, sizes = 0, []
        for count in images:
            sizes.append(sum(tokens[first : first + count]))
            first += count
        votes = self.head(out.pooler_output).split(sizes)
        return torch.stack([vote.logsumexp(0) for vote in votes])


def run_vision(work: StageRun) -> None:
    """Trains the tower on the labels of `work.studies`, which all have an image; a label that a study does not know is
    left out of the loss."""
    policy = work.policy
    labels = sorted({name for study in work.studies for name in study.labels})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed("head"))
        probe = Probe(policy, labels)
    strategy = beside_engine(work.recipe.distributed.strategy)
    distribute(probe, strategy, work.accelerator, half=policy.config.dtype == "bfloat16")

    def targets(study: Study) -> list[float]:
        known = {1: 1.0, 0: 0.0}
        return [known.get(study.labels.get(name, -1), float("nan")) for name in labels]

    def step_metrics(step: int) -> dict[str, float]:
        everyones = work.step_studies(step)
        known = sum(1 for study in everyones for value in targets(study) if value == value)
        total = torch.zeros((), device=policy.device)
        for studies in work.micro_batches(work.mine(everyones)):
            prompts = work.encode(studies)
            batch = policy.image_inputs(prompts, range(len(prompts)))
            counts = [len(prompt.images["image_grid_thw"]) for prompt in prompts]
            with work.accelerator.autocast():
                logits_BL = probe(batch["pixel_values"], batch["image_grid_thw"], counts).float()
            target_BL = torch.tensor([targets(study) for study in studies], device=policy.device)
            mask_BL = ~target_BL.isnan()
            loss = binary_cross_entropy_with_logits(logits_BL[mask_BL], target_BL[mask_BL], reduction="sum")
            loss = loss / max(1, known)
            work.backward(loss)
            total += loss.detach()
        return {"loss": float(work.accelerator.reduce(total, "sum"))}

    optimise(work, probe, step_metrics)
