"""vLLM in the trainer's process, on a CPU, beside the Hugging Face engine."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm", reason="`make test-vllm` runs these where vLLM is installed")

from tests.vllm.engines import SEEDS, TOKENS, largest_gap, lively_policy, same_greedy_reports, shake
from unirg.errors import UserError
from unirg.policy import EncodedPrompt, LoraConfig, Policy
from unirg.rollout import Sample, SamplingConfig
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.vllm_colocate import ColocatedSampler


@pytest.fixture(scope="module")
def sampler(policy: Policy) -> Iterator[ColocatedSampler]:
    sampler = ColocatedSampler(policy, VllmConfig(), SamplingConfig(max_new_tokens=TOKENS), images=2)
    yield sampler
    sampler.close()


def test_greedy_reports_are_the_hugging_face_engines(
    sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """From films: each prompt's first token differs from its neighbour's."""
    written = same_greedy_reports(sampler, policy, prompts)
    assert len({sample.ids for sample in written}) > 1 and max(len(sample.ids) for sample in written) > 3


def test_the_film_is_read(sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """The same text before another film is another report, or at least other log-probs: no cache takes one film's
    features, or keys and values, for another's."""
    mirrored = EncodedPrompt(
        "other film",
        prompts[0].ids_P,
        prompts[0].positions_3P,
        prompts[0].types_P,
        dict(prompts[0].images) | {"pixel_values": -prompts[0].images["pixel_values"]},
    )
    one, two = same_greedy_reports(sampler, policy, [prompts[0], mirrored])
    assert max(abs(a - b) for a, b in zip(one.logps, two.logps)) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_samples_are_the_trainers(
    sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt], temperature: float
) -> None:
    """Of the softmax at the temperature without banned tokens, which this policy would write all the time."""
    groups = sampler.sample(prompts, SEEDS, temperature=temperature, max_new_tokens=TOKENS)
    assert largest_gap(policy, prompts, groups, temperature) < 1e-5
    samples = [sample for group in groups for sample in group]
    assert not any(token in policy.banned_ids for sample in samples for token in sample.ids)
    assert len({sample.ids for sample in samples}) > len(samples) // 2
    assert any(sample.truncated for sample in samples) and not all(sample.truncated for sample in samples)
    for sample in samples:
        ends = [i for i, token in enumerate(sample.ids) if token in policy.stop_ids]
        assert sample.truncated == (not ends) and ends in ([], [len(sample.ids) - 1])
        assert sample.truncated <= (len(sample.ids) == TOKENS)


def test_banned_tokens_would_be_written_if_they_might(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """What the test above relies on."""
    free = Policy(**{name: getattr(policy, name) for name in policy.__dataclass_fields__ if name[0] != "_"})
    free.banned_ids = ()
    from unirg.rollout.hf import HFSampler

    groups = HFSampler(free).sample(prompts[:1], SEEDS[:1], temperature=1.0, max_new_tokens=TOKENS)
    assert any(token in policy.banned_ids for sample in groups[0] for token in sample.ids)


def test_samples_follow_seeds_and_nothing_else(sampler: ColocatedSampler, prompts: list[EncodedPrompt]) -> None:
    together = sampler.sample(prompts, SEEDS, temperature=1.0, max_new_tokens=TOKENS)
    alone = [
        sampler.sample([prompt], [seeds], temperature=1.0, max_new_tokens=TOKENS)[0]
        for prompt, seeds in zip(prompts[2:], SEEDS[2:])
    ]
    assert [[s.ids for s in group] for group in together[2:]] == [[s.ids for s in group] for group in alone]
    other = sampler.sample(prompts[2:], SEEDS[:2], temperature=1.0, max_new_tokens=TOKENS)
    assert [[s.ids for s in group] for group in other] != [[s.ids for s in group] for group in alone]


def test_a_group_is_told_while_others_are_written(
    sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest first; a tenth of the vocabulary ends a report here, so that they are of many lengths."""
    monkeypatch.setattr(policy, "stop_ids", (*policy.stop_ids, *range(40)))
    told: list[tuple[int, int]] = []
    going_on: list[bool] = []

    def finished(i: int, g: int, sample: Sample) -> None:
        told.append((i, g))
        going_on.append(sampler.engine.has_unfinished_requests())

    seeds = [[7 * i + g for g in range(1 + i % 3)] for i in range(12)]
    groups = sampler.sample(prompts * 3, seeds, temperature=1.0, max_new_tokens=TOKENS, finished=finished)
    assert sorted(told) == [(i, g) for i in range(12) for g in range(1 + i % 3)] and going_on.count(True) > 6
    longest = [max(len(sample.ids) for sample in groups[i]) for i, _ in told]
    assert longest == sorted(longest) and len(set(longest)) > 3


def test_samples_follow_the_weights(sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """The vision tower's too: its features of the same film are computed anew."""
    before = same_greedy_reports(sampler, policy, prompts)
    shake(policy, 1)
    sampler.sync_weights()
    after = same_greedy_reports(sampler, policy, prompts)
    assert [sample.ids for sample in before] != [sample.ids for sample in after]
    with torch.no_grad():
        for parameter in policy.base.model.visual.parameters():
            parameter.mul_(1.5)
    sampler.sync_weights()
    seen = same_greedy_reports(sampler, policy, prompts)
    assert max(abs(a - b) for s, t in zip(after, seen) for a, b in zip(s.logps, t.logps)) > 1e-3


def test_an_error_leaves_nothing_behind(
    sampler: ColocatedSampler, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """A prompt with a run of image tokens too many (of films: too few) names its study; the engine goes on."""
    twice = EncodedPrompt("odd", torch.cat([prompts[0].ids_P, prompts[0].ids_P]), None, None, prompts[0].images)
    with pytest.raises(UserError, match="study odd: its prompt has 1 images and 2 runs of image tokens"):
        sampler.sample([prompts[0], twice], [[0], [1]], temperature=1.0, max_new_tokens=TOKENS)
    assert not sampler.engine.has_unfinished_requests()
    same_greedy_reports(sampler, policy, prompts)


def test_the_trainers_random_state_and_threads_are_its_own(
    sampler: ColocatedSampler, prompts: list[EncodedPrompt]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler.sample(prompts, SEEDS, temperature=1.0, max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


def test_adapters_in_a_second_engine(sampler: ColocatedSampler, prompts: list[EncodedPrompt]) -> None:
    """A stage after a stage in one process; the adapters are in what vLLM samples from."""
    sampler.close()
    policy = lively_policy(LoraConfig(rank=4))
    shake(policy, 2)
    again = ColocatedSampler(policy, VllmConfig(), SamplingConfig(max_new_tokens=TOKENS), images=2)
    try:
        with_adapters = same_greedy_reports(again, policy, prompts)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.0)
        again.sync_weights()
        assert [s.logps for s in same_greedy_reports(again, policy, prompts)] != [s.logps for s in with_adapters]
    finally:
        again.close()
        sampler.close = lambda: None  # type: ignore[method-assign]
