"""Supervised fine-tuning: the mean negative log-likelihood of the studies' reports, as a loss of our own loop."""

from collections.abc import Callable

import torch

from unirg.errors import UserError
from unirg.grpo.forward import answer_logps
from unirg.prompt import report_text
from unirg.steps import optimise
from unirg.study import Study
from unirg.training import StageRun


def run_sft(work: StageRun, evaluate: Callable[[], dict[str, float]] | None) -> None:
    """Trains `work.policy` on the reports of `work.studies` for the stage's steps.

    Raises UserError naming a study whose report is empty.
    """
    policy = work.policy
    answers: dict[str, list[int]] = {}

    def answer(study: Study) -> list[int]:
        if study.id not in answers:
            text = report_text(study)
            if not text:
                raise UserError(f"study {study.id}: has neither findings nor impression to learn from")
            answers[study.id] = policy.answer_ids(text)
        return answers[study.id]

    def step_metrics(step: int) -> dict[str, float]:
        everyones = work.step_studies(step)
        tokens = sum(len(answer(study)) for study in everyones)  # of the whole step: shares of the loss add up
        total = torch.zeros((), device=policy.device)
        policy.model.train()
        mine = work.mine(everyones)
        if work.stage.studies_per_forward:  # by length: a forward of short reports is not padded to the step's longest
            mine.sort(key=lambda study: len(answer(study)))
        for studies in work.micro_batches(mine):
            prompts = work.encode(studies)
            with work.accelerator.autocast():
                scores = answer_logps(
                    policy,
                    prompts,
                    [[answer(study)] for study in studies],
                )
                loss = -scores.logps_BT.sum() / tokens
            work.backward(loss)
            total += loss.detach()
        return {"loss": float(work.accelerator.reduce(total, "sum")), "num_tokens": float(tokens)}

    optimise(work, policy.model, step_metrics, evaluate=evaluate)
