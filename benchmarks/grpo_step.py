"""One GRPO step by phase: our loop against TRL's GRPOTrainer, same policy, studies, prompts, reward and batch.

    python benchmarks/grpo_step.py --quick        # under a minute on two cores
    python benchmarks/grpo_step.py --json > grpo_step.json

Both sample with transformers from a random tiny Qwen3-VL, so nearly all reports run to the length limit and neither
side has more tokens to work on. Gradient checkpointing is off on both sides, one thread each.
"""

from typing import Any

import measure
from trl import GRPOConfig, GRPOTrainer

from unirg.grpo import loop
from unirg.recipe.schema import GrpoStage, OptimiserConfig
from unirg.rollout.hf import HFSampler
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import load_reward
from unirg.training import StageRun

RATE = 1e-5
PHASES = {
    "sampling": (["sampling"], ["sampling"]),
    "scoring": (["scoring"], ["scoring"]),
    "log-probs and loss": (["logps", "loss"], ["logps"]),
    "backward": (["backward"], ["backward"]),
}
# studies per step, reports per study, tokens per report, film size in pixels (a token per 32 x 32)
QUICK = [(2, 8, 32, 96)]
SETTINGS = [(4, 8, 64, 96), (4, 8, 64, 384), (2, 16, 64, 384)]


def our_work(studies: int, group: int, tokens: int, image: int, steps: int) -> StageRun:
    """A GRPO stage of our loop, ready to run."""
    stage = GrpoStage(
        kind="grpo",
        name="grpo",
        steps=steps,
        studies_per_step=studies,
        group_size=group,
        optimiser=OptimiserConfig(learning_rate=RATE, schedule="constant", warmup=0),
        rewards=[RewardConfig(name="rouge_l")],
        sampling={"max_new_tokens": tokens},
        checkpoint_every=10_000,
    )
    return measure.our_stage(stage, studies * steps, image)


def trl_trainer(work: StageRun, tokens: int) -> Any:
    """TRL's trainer on what our loop is about to train on."""
    stage = work.stage
    reward = load_reward("rouge_l", {})

    def rouge_l(completions: list[list[dict[str, str]]], reference: list[str], **_: Any) -> list[float | None]:
        return reward.score([completion[0]["content"] for completion in completions], reference)

    arguments = GRPOConfig(
        output_dir=str(work.run / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.studies_per_step * stage.group_size,
        num_generations=stage.group_size,
        max_completion_length=tokens,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        loss_type="grpo",
        dataloader_pin_memory=False,
    )
    return GRPOTrainer(
        model=measure.twin(work.policy),
        reward_funcs=rouge_l,
        args=arguments,
        train_dataset=measure.dataset(measure.rows(work.policy, work.studies)),
        processing_class=work.policy.processor,
    )


def compare(studies: int, group: int, tokens: int, image: int, steps: int) -> dict[str, Any]:
    work = our_work(studies, group, tokens, image, steps)
    trainer, watch = trl_trainer(work, tokens), measure.TrainerWatch()
    watch.add(trainer, "_generate", "sampling")
    watch.add(trainer, "_calculate_rewards", "scoring")
    watch.add(trainer, "_compute_loss", "logps")
    watch.add(trainer.accelerator, "backward", "backward")
    trl = measure.train(trainer, watch)
    loop.Stopwatch = measure.CpuStopwatch
    loop.run_grpo(work, HFSampler(work.policy), ScoringEngine(work.stage.rewards), None, None)
    prompt = len(work.policy.encode(work.studies[0]))
    title = f"GRPO, {studies} studies x {group} reports, prompt {prompt} tokens, reports up to {tokens}"
    return measure.compare(title, PHASES, measure.our_steps(work), trl)


if __name__ == "__main__":
    measure.main(__doc__, compare, quick=(QUICK, 9), full=(SETTINGS, 6))
