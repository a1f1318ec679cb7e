"""The policy loss: values by hand, what the masks keep out, and that micro-batches add up to the step."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import unirg.grpo.loss as loss_module
from unirg.grpo.loss import (
    LossConfig,
    Normaliser,
    grpo_loss,
    logps_and_entropy,
    sampler_correction,
    sampler_metrics,
)

KINDS = ["grpo", "dr_grpo", "dapo", "gspo"]


def step(seed: int = 0, reports: int = 6, length: int = 5) -> dict[str, Tensor]:
    """A step's tensors: policy, old and reference log-probs, a mask of unequal lengths, advantages."""
    generator = torch.Generator().manual_seed(seed)
    logps_BT = -torch.rand(reports, length, generator=generator, dtype=torch.float64) * 3
    lengths_B = torch.randint(1, length + 1, (reports,), generator=generator)
    return {
        "logps_BT": logps_BT,
        "old_logps_BT": logps_BT + torch.randn(reports, length, generator=generator, dtype=torch.float64) * 0.3,
        "reference_logps_BT": logps_BT + torch.randn(reports, length, generator=generator, dtype=torch.float64) * 0.3,
        "entropies_BT": torch.rand(reports, length, generator=generator, dtype=torch.float64),
        "mask_BT": torch.arange(length) < lengths_B[:, None],
        "advantages_B": torch.randn(reports, generator=generator, dtype=torch.float64),
    }


def counts(mask_BT: Tensor, longest: int = 8) -> Normaliser:
    return Normaliser(int(mask_BT.any(1).sum()), int(mask_BT.sum()), longest)


def test_on_policy_loss_by_hand() -> None:
    # ratio 1: the loss of a token is minus its report's advantage; lengths 1 and 3, advantages 2 and -1
    logps_BT = torch.zeros(2, 3, requires_grad=True)
    mask_BT = torch.tensor([[1, 0, 0], [1, 1, 1]])
    expected = {"grpo": (-2 + 1) / 2, "gspo": (-2 + 1) / 2, "dapo": (-2 + 3) / 4, "dr_grpo": (-2 + 3) / (2 * 8)}
    for kind, value in expected.items():
        result = grpo_loss(
            logps_BT,
            None,
            mask_BT,
            torch.tensor([2.0, -1.0]),
            config=LossConfig(kind=kind),
            normaliser=counts(mask_BT),
        )
        assert result.loss.item() == pytest.approx(value)


def test_kl_is_k3_with_the_gradient_of_the_reverse_kl() -> None:
    # log(pi_ref / pi) = log 2: the value is 2 - log 2 - 1, the gradient by log pi is log(pi / pi_ref) = -log 2
    logps_BT = torch.zeros(1, 1, requires_grad=True)
    result = grpo_loss(
        logps_BT,
        None,
        torch.ones(1, 1),
        torch.zeros(1),
        config=LossConfig(kl=0.5),
        normaliser=Normaliser(1, 1, 8),
        reference_logps_BT=torch.full((1, 1), math.log(2)),
    )
    assert result.metrics["kl"].item() == pytest.approx(1 - math.log(2))
    assert result.loss.item() == pytest.approx(0.5 * (1 - math.log(2)))
    (gradient,) = torch.autograd.grad(result.loss, logps_BT)
    assert gradient.item() == pytest.approx(-0.5 * math.log(2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves", "metric"),
    [
        (1.5, 1.0, False, "clip_ratio/high_mean"),  # already likelier than wanted: no further push
        (0.5, -1.0, False, "clip_ratio/low_mean"),  # already unlikelier than wanted
        (1.5, -1.0, True, None),  # went the wrong way: the clip must not protect it
        (0.5, 1.0, True, None),
        (1.25, 1.0, True, None),  # inside clip_high = 0.3, outside clip_low = 0.2
    ],
)
def test_clip_stops_only_what_went_far_enough(ratio: float, advantage: float, moves: bool, metric: str | None) -> None:
    for kind in KINDS:
        logps_BT = torch.full((1, 2), math.log(ratio), requires_grad=True)
        result = grpo_loss(
            logps_BT,
            torch.zeros(1, 2),
            torch.ones(1, 2),
            torch.tensor([advantage]),
            config=LossConfig(kind=kind, clip_low=0.2, clip_high=0.3),
            normaliser=Normaliser(1, 2, 8),
        )
        (gradient,) = torch.autograd.grad(result.loss, logps_BT)
        assert bool(gradient.abs().sum() > 0) is moves
        for name in ("low", "high", "region"):
            name = f"clip_ratio/{name}_mean"
            assert result.metrics[name].item() == (metric is not None and name in (metric, "clip_ratio/region_mean"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [1, 5]])
def test_micro_batches_add_up_to_the_step(kind: str, sizes: list[int]) -> None:
    data, config = step(), LossConfig(kind=kind, kl=0.1)
    data["mask_BT"][3] = False  # a masked report: its micro-batch may hold nothing else
    normaliser = counts(data["mask_BT"])
    weights_BT = sampler_correction(data["logps_BT"], data["old_logps_BT"], data["mask_BT"], "truncate", "token", 1.2)

    def run(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        result = grpo_loss(
            **{name: value[rows] for name, value in data.items()} | {"logps_BT": logps_BT[rows]},
            sampler_weights=weights_BT[rows],
            config=config,
            normaliser=normaliser,
        )
        result.loss.backward()
        return result.loss.detach(), result.metrics

    logps_BT = data["logps_BT"].clone().requires_grad_()
    whole, whole_metrics = run(slice(None))
    whole_gradient, logps_BT.grad = logps_BT.grad, None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [run(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(logps_BT.grad, whole_gradient)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), value, msg=name)
    assert whole_metrics["entropy"] == pytest.approx(data["entropies_BT"][data["mask_BT"]].mean().item())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_the_mask_reaches_loss_or_gradient(kind: str) -> None:
    clean, config = step(1), LossConfig(kind=kind, kl=0.1)
    dirty = {name: value.clone() for name, value in clean.items()}
    for name in ("logps_BT", "old_logps_BT", "reference_logps_BT", "entropies_BT"):
        dirty[name][~clean["mask_BT"]] = float("nan")
    results = []
    for data in (clean, dirty):
        logps_BT = data["logps_BT"].requires_grad_()
        result = grpo_loss(**data, config=config, normaliser=counts(data["mask_BT"]))
        (gradient,) = torch.autograd.grad(result.loss, logps_BT)
        results.append((result.loss, gradient, result.metrics))
    torch.testing.assert_close(results[0], results[1])


def test_padding_to_a_longer_row_changes_nothing() -> None:
    data = step(2)
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in data.items() if name.endswith("_BT")}
    for kind in KINDS:
        config, normaliser = LossConfig(kind=kind, kl=0.1), counts(data["mask_BT"])
        torch.testing.assert_close(
            grpo_loss(**data, config=config, normaliser=normaliser).loss,
            grpo_loss(**data | padded, config=config, normaliser=normaliser).loss,
        )


def test_a_step_in_which_everything_is_masked_has_loss_zero() -> None:
    data = step(3)
    data["mask_BT"][:] = False
    for kind in KINDS:
        logps_BT = data["logps_BT"].clone().requires_grad_()
        result = grpo_loss(
            **data | {"logps_BT": logps_BT}, config=LossConfig(kind=kind), normaliser=counts(data["mask_BT"])
        )
        result.loss.backward()
        assert result.loss == 0 and logps_BT.grad.abs().sum() == 0


def test_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl=0\.1"):
        grpo_loss(
            torch.zeros(1, 1),
            None,
            torch.ones(1, 1),
            torch.ones(1),
            config=LossConfig(kl=0.1),
            normaliser=Normaliser(1, 1, 1),
        )


def test_config_refuses_what_makes_no_sense() -> None:
    for wrong in (
        {"kl": -0.1},
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"correction_cap": 0.5},
        {"kind": "ppo"},
        {"beta": 0.1},
    ):
        with pytest.raises(ValidationError):
            LossConfig(**wrong)


def test_sampler_correction_by_hand() -> None:
    # ratios trainer / sampler: 2, 4 and (masked) 100; the product of the report is 8
    logps_BT = torch.tensor([[2.0, 4.0, 100.0]]).log()
    sampler_BT, mask_BT = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])

    def weights(mode: str, level: str, cap: float) -> list[float]:
        return sampler_correction(logps_BT, sampler_BT, mask_BT, mode, level, cap)[0].tolist()

    assert weights("truncate", "token", 3) == pytest.approx([2, 3, 1])
    assert weights("mask", "token", 3) == pytest.approx([2, 0, 1])
    assert weights("truncate", "sequence", 3) == pytest.approx([3])
    assert weights("mask", "sequence", 3) == pytest.approx([0])
    assert weights("mask", "sequence", 9) == pytest.approx([8])
    assert weights("none", "sequence", 3) == [1]
    sampler_BT[0, 1] = float("nan")  # the engine gave no log-prob: no correction for this token
    assert weights("truncate", "token", 3) == pytest.approx([2, 1, 1])
    assert weights("mask", "sequence", 3) == pytest.approx([2])


def test_sampler_metrics_ignore_padding_and_missing_values() -> None:
    logps_BT = torch.tensor([[2.0, 4.0, 100.0], [1.0, 1.0, 1.0]]).log()
    sampler_BT = torch.tensor([[0.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[1, 1, 0], [0, 0, 0]])
    for level, smallest in (("token", 1.0), ("sequence", 2.0)):
        ratios = sampler_correction(logps_BT, sampler_BT, mask_BT, "truncate", level, 3)
        metrics = sampler_metrics(ratios, logps_BT, sampler_BT, mask_BT)
        assert metrics["sampling/importance_sampling_ratio/min"].item() == pytest.approx(smallest)
        assert metrics["sampling/importance_sampling_ratio/max"].item() == pytest.approx(2)
        assert metrics["sampling/sampling_logp_difference/max"].item() == pytest.approx(math.log(2))
    nothing = sampler_metrics(ratios, logps_BT, sampler_BT, torch.zeros_like(mask_BT))
    assert all(value == 0 for value in nothing.values())


@pytest.mark.parametrize("banned", [[], [9, 10]])
def test_logps_and_entropy_equal_log_softmax_over_allowed_tokens(
    monkeypatch: pytest.MonkeyPatch, banned: list[int]
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 44)  # 4 rows of 11: the last chunk is smaller
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 7, 11, dtype=torch.float64, requires_grad=True)
    ids_BT = torch.randint(0, 9, (2, 7))
    upstream_BT = torch.randn(2, 7, dtype=torch.float64)
    logps_BT, entropies_BT = logps_and_entropy(logits_BTV, ids_BT, 0.7, banned)
    expected_BTV = (logits_BTV[..., : 11 - len(banned)] / 0.7).log_softmax(-1)
    expected_BT = expected_BTV.gather(-1, ids_BT[..., None])[..., 0]
    torch.testing.assert_close(logps_BT, expected_BT)
    torch.testing.assert_close(entropies_BT, -(expected_BTV.exp() * expected_BTV).sum(-1))
    assert not entropies_BT.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad((logps_BT * upstream_BT).sum(), logits_BTV),
        torch.autograd.grad((expected_BT * upstream_BT).sum(), logits_BTV),
    )


def test_logps_of_bfloat16_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    logits_BTV = (torch.randn(1, 4, 1000) * 5).bfloat16().requires_grad_()
    ids_BT = torch.randint(0, 1000, (1, 4))
    logps_BT, _ = logps_and_entropy(logits_BTV, ids_BT)
    expected = logits_BTV.double().log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]
    assert logps_BT.dtype == torch.float32
    torch.testing.assert_close(logps_BT.double(), expected, atol=1e-5, rtol=1e-6)
    (gradient,) = torch.autograd.grad(logps_BT.sum(), logits_BTV)
    assert gradient.dtype == torch.bfloat16


def test_a_banned_token_gets_no_probability_and_no_gradient() -> None:
    logits_BTV = torch.tensor([[[0.0, 0.0, 50.0]]], requires_grad=True)
    logps_BT, entropies_BT = logps_and_entropy(logits_BTV, torch.tensor([[0]]), banned_ids=[2])
    assert logps_BT.item() == pytest.approx(math.log(0.5)) and entropies_BT.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(logps_BT.sum(), logits_BTV)
    assert gradient[0, 0].tolist() == pytest.approx([0.5, -0.5, 0.0])


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        logps_and_entropy(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), 0.0)
