"""The evaluation within a stage: greedy reports of dev studies by the policy as it stands, and their figures."""

import math
from collections.abc import Callable, Sequence

from unirg import ranks
from unirg.data import load_studies
from unirg.evaluation.evaluate import measure
from unirg.evaluation.run import max_new_tokens
from unirg.rollout import Sampler
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study
from unirg.training import StageRun


def dev_studies(work: StageRun) -> Sequence[Study]:
    """The studies that the stage is evaluated on while it trains; none where it is not."""
    if not work.stage.evaluate_every:
        return []
    return load_studies(work.recipe.data, "dev")[: work.stage.evaluate_studies]


def dev_evaluation(
    work: StageRun, studies: Sequence[Study], sampler: Sampler, engine: ScoringEngine | None
) -> Callable[[], dict[str, float]]:
    """A function that has `sampler` write greedy reports of `studies` with the policy as it stands, each rank its
    share, and returns their figures. The first rank measures them (some figures are of all reports together), with its
    `engine` for the recipe's metrics. All ranks call it together."""
    config, world = work.recipe.evaluation, work.accelerator.num_processes
    limit = max_new_tokens(work.recipe)

    def evaluate() -> dict[str, float]:
        with work.together("weights"):
            sampler.sync_weights()
        mine = work.mine(studies)
        texts: dict[str, str] = {}
        # As many batches on every rank, some without studies: an engine may need all ranks in each.
        for first in range(0, math.ceil(len(studies) / world), config.batch_size):
            batch = mine[first : first + config.batch_size]
            prompts = work.encode(batch)
            with work.together("evaluation"), work.accelerator.autocast():
                groups = sampler.sample(prompts, [[0]] * len(batch), temperature=0.0, max_new_tokens=limit)
            texts |= {study.id: group[0].text for study, group in zip(batch, groups, strict=True)}
        texts = {key: text for share in ranks.everyones(texts) for key, text in share.items()}
        figures: dict[str, float] = {}
        with work.together("evaluation"):
            if work.accelerator.is_main_process:
                statistics = measure(studies, texts, engine).statistics
                wanted = [config.headline, *[metric.log_label for metric in config.metrics], "length", "duplicates"]
                figures = {name: statistics[name].value for name in dict.fromkeys(wanted) if name in statistics}
        return ranks.everyones(figures)[0]

    return evaluate
