"""Our dense loss, its gradient, and our advantages against TRL's own `GRPOTrainer` on one batch.

The oracle runs unchanged: TRL's trainer tokenises the prompts, pads, computes advantages, forwards and takes the loss.
Only sampling and scoring are replaced, so that both sides get the same reports and the same scores.
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unirg.grpo.advantages import advantages
from unirg.grpo.forward import answer_logps
from unirg.grpo.loss import LossConfig, Normaliser, grpo_loss, sampler_correction, sampler_metrics
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig, build_messages, report_text
from unirg.study import Study, StudyImage
from unirg.tiny import TinyConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

GROUP, TEMPERATURE, LONGEST = 4, 0.7, 12
WEIGHTS = {"style": 1.0, "content": 0.5}
KINDS = {  # ours -> TRL's loss type and level of the importance ratio
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
}


def draw(study: int, film: int) -> Image.Image:
    """An invented film: noise, of a size that differs between studies so that prompts differ in length."""
    generator = np.random.default_rng((study, film))
    return Image.fromarray(generator.integers(0, 256, (64, 64 + 32 * study, 3), dtype=np.uint8))


STUDIES = [
    Study(id="a", images=(StudyImage(np.asarray(draw(0, 0))),), indication="Cough.", findings="Clear lungs."),
    Study(
        id="b",
        images=(StudyImage(np.asarray(draw(1, 0))), StudyImage(np.asarray(draw(1, 1)))),
        findings="Small left effusion.",
        impression="Effusion.",
    ),
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = PolicyConfig(tiny=TinyConfig(hidden=64, layers=2, heads=2, mlp=96, vision_hidden=64, vision_layers=2))
    prompt = PromptConfig(style="short")
    texts = [report_text(study) for study in STUDIES] + ["write findings and impression"]
    policy = load_policy(config, prompt, texts=texts, seed=0)
    # TRL trains over the whole vocabulary although it suppresses the image token when sampling.
    return dataclasses.replace(policy, banned_ids=())


@pytest.fixture(scope="module")
def answers(policy: Policy) -> list[list[list[int]]]:
    """Invented reports as token ids, of unequal lengths; the last of each group is cut off by the length limit."""
    generator = np.random.default_rng(0)
    lengths = [[3, 7, 5, LONGEST], [1, 4, 9, LONGEST]]
    return [[[*generator.integers(10, 250, n - 1).tolist(), policy.eos_id] for n in group] for group in lengths]


@pytest.fixture(scope="module")
def trainer(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [
        {
            "prompt": [{"role": "user", "content": build_messages(study, policy.prompt)[0]["content"][-1]["text"]}],
            "images": [image.load() for image in study.images],
        }
        for study in STUDIES
    ]
    rewards = []
    for label in WEIGHTS:
        rewards.append(lambda completions, **_: [0.0] * len(completions))
        rewards[-1].__name__ = label
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(STUDIES) * GROUP,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        gradient_checkpointing=False,
        reward_weights=list(WEIGHTS.values()),
        epsilon=0.1,
        epsilon_high=0.2,
        disable_dropout=True,
    )
    return trl.GRPOTrainer(
        model=copy.deepcopy(policy.model),  # TRL replaces its forward
        reward_funcs=rewards,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=policy.processor,
    )


def trl_batch(
    trainer: Any,
    policy: Policy,
    answers: list[list[list[int]]],
    scores_NR: torch.Tensor,
    sampler_logps: list[list[float]] | None = None,
) -> dict[str, Any]:
    """What TRL makes of these reports and scores: its padded batch, its advantages, its weights against the sampler."""
    rows = [row for row in trainer.train_dataset for _ in range(GROUP)]
    prompts = [policy.encode(study).ids_P.tolist() for study in STUDIES for _ in range(GROUP)]
    flat = [answer for group in answers for answer in group]
    texts = [[{"role": "assistant", "content": policy.decode(answer)}] for answer in flat]
    trainer._generate = lambda _: (prompts, flat, None, texts, sampler_logps, {}, None, None)
    trainer._calculate_rewards = lambda *_: scores_NR
    trainer.use_vllm, trainer.beta = sampler_logps is not None, 0.0
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer.model.train()
    return trainer._generate_and_score_completions(rows)


SCORES_NR = torch.tensor([[0.1, 2.0], [0.7, 1.0], [0.3, 0.0], [0.9, 1.0], [0.2, 1.0], [0.2, 1.5], [0.5, 1.0], [0.4, 0]])


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """TRL's own cut of a batch into micro-batches."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    cut = split_tensor_dict(split_pixel_values_by_grid(batch), parts)
    return [unsplit_pixel_values_by_grid(part) for part in cut]


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a model in one vector; parameters without one count as zeros."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in sorted(model.named_parameters())]
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_trl(
    trainer: Any, policy: Policy, answers: list[list[list[int]]], kind: str, kl: float, micro_batches: int
) -> None:
    prompts = [policy.encode(study) for study in STUDIES]
    policy.model.zero_grad()
    ours = answer_logps(policy, prompts, answers, temperature=TEMPERATURE)
    # Policies some steps away, so that some tokens are clipped on either side, and a sampler that is off by a little.
    torch.manual_seed(0)
    old_BT = ours.logps_BT.detach() + 0.2 * torch.randn_like(ours.logps_BT)
    reference_BT = ours.logps_BT.detach() + 0.5 * torch.randn_like(ours.logps_BT)
    weights_BT = 1 + 0.2 * torch.rand_like(ours.logps_BT)

    batch = trl_batch(trainer, policy, answers, SCORES_NR)
    batch |= {
        "old_per_token_logps": old_BT,
        "ref_per_token_logps": reference_BT,
        "importance_sampling_ratio": weights_BT,
    }
    trainer.loss_type, trainer.importance_sampling_level = KINDS[kind]
    trainer.beta, trainer.use_vllm = kl, True  # with vLLM the loss applies the weights
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = micro_batches
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    losses = []
    for part in split(batch, micro_batches):
        losses.append(trainer._compute_loss(trainer.model, part))
        losses[-1].backward()

    result = grpo_loss(
        ours.logps_BT,
        old_BT,
        ours.mask_BT,
        batch["advantages"],
        config=LossConfig(kind=kind, clip_low=0.1, clip_high=0.2, kl=kl),
        normaliser=Normaliser(len(ours.mask_BT), int(ours.mask_BT.sum()), LONGEST),
        reference_logps_BT=reference_BT if kl else None,
        sampler_weights=weights_BT,
        entropies_BT=ours.entropies_BT,
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach(), sum(losses).detach(), rtol=1e-5, atol=1e-6)
    mine, theirs = gradient(policy.model), gradient(trainer.model)
    assert theirs.norm() > 1e-3
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    if micro_batches == 1:
        metrics = trainer._metrics["train"]
        assert ("kl" in result.metrics) == ("kl" in metrics)
        assert result.metrics["clip_ratio/low_mean"] > 0 or result.metrics["clip_ratio/high_mean"] > 0 or kind == "gspo"
        for name, value in result.metrics.items():
            assert value.item() == pytest.approx(metrics[name][0], rel=1e-5, abs=1e-7), name


def test_log_probs_equal_trl(trainer: Any, policy: Policy, answers: list[list[list[int]]]) -> None:
    batch = trl_batch(trainer, policy, answers, SCORES_NR)
    with torch.no_grad():
        ours = answer_logps(policy, [policy.encode(study) for study in STUDIES], answers, temperature=TEMPERATURE)
        theirs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            compute_entropy=True,
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            num_images=batch["num_images"],
            mm_token_type_ids=batch["mm_token_type_ids"],
        )
    mask = batch["completion_mask"].bool()
    assert torch.equal(mask, ours.mask_BT.bool())
    torch.testing.assert_close(ours.logps_BT[mask], theirs[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropies_BT[mask], entropies[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_correction_equals_trl(
    trainer: Any, policy: Policy, answers: list[list[list[int]]], mode: str, level: str
) -> None:
    with torch.no_grad():
        ours = answer_logps(policy, [policy.encode(study) for study in STUDIES], answers, temperature=TEMPERATURE)
    torch.manual_seed(1)
    sampler_BT = (ours.logps_BT + 0.4 * torch.randn_like(ours.logps_BT)) * ours.mask_BT
    sampler_BT[3, 2] = torch.nan  # the engine gave none
    trainer.vllm_importance_sampling_mode = f"{level}_{mode}"
    trainer.vllm_importance_sampling_clip_max = 1.3
    trainer._metrics["train"].clear()
    lists = [row[: int(n)].tolist() for row, n in zip(sampler_BT, ours.mask_BT.sum(1), strict=True)]
    theirs = trl_batch(trainer, policy, answers, SCORES_NR, lists)["importance_sampling_ratio"]
    weights = sampler_correction(ours.logps_BT, sampler_BT, ours.mask_BT, mode, level, 1.3)
    assert (weights == (0.0 if mode == "mask" else 1.3)).any()  # something did exceed the cap
    torch.testing.assert_close(weights, theirs, rtol=1e-5, atol=1e-6)
    for name, value in sampler_metrics(weights, ours.logps_BT, sampler_BT, ours.mask_BT).items():
        assert value.item() == pytest.approx(trainer._metrics["train"][name][0], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalise", "group"),
        ("sum_then_normalise", "batch"),
        ("sum_then_normalise", "none"),
        ("normalise_then_sum", "group"),
    ],
)
@pytest.mark.parametrize("unscorable", [False, True])
def test_advantages_equal_trl(
    trainer: Any, policy: Policy, answers: list[list[list[int]]], aggregation: str, scale: str, unscorable: bool
) -> None:
    scores_NR = SCORES_NR.clone()
    if unscorable:  # no reward could judge it: the case of missing scores in which TRL masks as we do
        scores_NR[5] = torch.nan
    trainer.multi_objective_aggregation = aggregation.replace("normalise", "normalize")
    trainer.scale_rewards = scale
    trainer._metrics["train"].clear()
    theirs = trl_batch(trainer, policy, answers, scores_NR)["advantages"]
    columns = dict(zip(WEIGHTS, scores_NR.T.tolist(), strict=True))
    ours = advantages(columns, WEIGHTS, GROUP, aggregation, scale)
    torch.testing.assert_close(ours.advantages_N, theirs, rtol=1e-5, atol=1e-6)
    assert ours.mask_N.tolist() == [not (unscorable and i == 5) for i in range(8)]
    assert ours.rewards_N.nanmean().item() == pytest.approx(trainer._metrics["train"]["reward"][-1], rel=1e-5)
