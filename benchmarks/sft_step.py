"""One SFT step: our loop against TRL's SFTTrainer with its vision-language collator, same policy, studies and batch.

    python benchmarks/sft_step.py --quick         # under a minute on two cores
    python benchmarks/sft_step.py --json > sft_step.json

This is the figure by which the warm start has a loop of its own. It is the first epoch; in later ones ours finds its
prompts processed, while TRL's collator runs image processor and tokenizer again. One thread each.
"""

from typing import Any

import measure
from trl import SFTConfig, SFTTrainer

from unirg.recipe.schema import OptimiserConfig, SftStage
from unirg.sft import run_sft

RATE = 1e-5
# studies per step, film size in pixels (a token per 32 x 32)
QUICK = [(16, 96)]
SETTINGS = [(32, 96), (16, 384)]


def compare(studies: int, image: int, steps: int) -> dict[str, Any]:
    stage = SftStage(
        kind="sft",
        name="sft",
        steps=steps,
        studies_per_step=studies,
        optimiser=OptimiserConfig(learning_rate=RATE, schedule="constant", warmup=0),
        checkpoint_every=10_000,
    )
    work = measure.our_stage(stage, studies * steps, image)
    items = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": row["reference"]}],
            "images": row["images"],
        }
        for row in measure.rows(work.policy, work.studies)
    ]
    arguments = SFTConfig(
        output_dir=str(work.run / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_steps=steps,
        per_device_train_batch_size=studies,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=measure.twin(work.policy),
        args=arguments,
        train_dataset=measure.dataset(items),
        processing_class=work.policy.processor,
    )
    trl = measure.train(trainer, measure.TrainerWatch())
    run_sft(work, None)
    ours = measure.our_steps(work)
    prompt = len(work.policy.encode(work.studies[0]))
    title = f"SFT, {studies} studies, prompt {prompt} tokens"
    return measure.compare(title, {}, ours, trl)


if __name__ == "__main__":
    measure.main(__doc__, compare, quick=(QUICK, 5), full=(SETTINGS, 10))
