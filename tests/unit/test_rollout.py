"""Rollouts: what is sampled, and that its log-probs are those that training sees."""

from concurrent.futures import CancelledError

import pytest
import torch

from unirg.grpo.forward import answer_logps
from unirg.policy import Policy
from unirg.rollout import Sample, generate_reports, request_seed
from unirg.rollout.hf import CopySampler, HFSampler
from unirg.scoring.job_thread import JobThread
from unirg.study import Study


def sample(policy: Policy, studies: list[Study], group: int = 4, temperature: float = 1.0, tokens: int = 12, **kw):
    seeds = [[request_seed(study.id, g) for g in range(group)] for study in studies]
    prompts = [policy.encode(study) for study in studies]
    return HFSampler(policy, **kw).sample(prompts, seeds, temperature=temperature, max_new_tokens=tokens)


def test_a_sample_depends_on_its_prompt_and_seed_alone(tiny_policy: Policy, studies: list[Study]) -> None:
    together = sample(tiny_policy, studies)
    assert [len(group) for group in together] == [4] * 4
    alone = [sample(tiny_policy, [study])[0] for study in studies]
    split = sample(tiny_policy, studies, rows_per_forward=5)
    for a, b, c in zip(together, alone, split, strict=True):
        assert [s.ids for s in a] == [s.ids for s in b] == [s.ids for s in c]
    assert len({s.ids for group in together for s in group}) > 8


def test_each_sample_is_told_once_as_it_is_finished(tiny_policy: Policy, studies: list[Study]) -> None:
    tiny_policy.stop_ids = tuple(range(0, 400, 9))  # reports end at many lengths
    told: list[tuple[int, int, Sample]] = []
    prompts = [tiny_policy.encode(study) for study in studies]
    seeds = [[request_seed(study.id, g) for g in range(4)] for study in studies]
    groups = HFSampler(tiny_policy, rows_per_forward=8).sample(
        prompts, seeds, temperature=1.0, max_new_tokens=40, finished=lambda i, g, sample: told.append((i, g, sample))
    )
    assert sorted((i, g) for i, g, _ in told) == [(i, g) for i in range(4) for g in range(4)]
    assert all(groups[i][g] == sample for i, g, sample in told)
    for first in (0, 8):  # in each decoding the shortest come first
        lengths = [len(sample.ids) for _, _, sample in told[first : first + 8]]
        assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_a_closed_sampler_ends_at_its_next_token(tiny_policy: Policy, studies: list[Study]) -> None:
    tiny_policy.stop_ids = ()
    sampler, thread = CopySampler(tiny_policy), JobThread("sampling")
    prompts = [tiny_policy.encode(study) for study in studies]
    sampling = thread.later(lambda: sampler.sample(prompts, [[0]] * 4, temperature=1.0, max_new_tokens=100_000))
    sampler.close()
    with pytest.raises(CancelledError):
        sampling.result(timeout=20)
    thread.end()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_training_forward(
    tiny_policy: Policy, studies: list[Study], temperature: float
) -> None:
    groups = sample(tiny_policy, studies, temperature=temperature)
    scores = answer_logps(
        tiny_policy,
        [tiny_policy.encode(study) for study in studies],
        [[s.ids for s in group] for group in groups],
        temperature=temperature,
    )
    rows = [s for group in groups for s in group]
    for row, s in enumerate(rows):
        assert scores.mask_BT[row].sum() == len(s.ids)
        torch.testing.assert_close(scores.logps_BT[row, : len(s.ids)], torch.tensor(s.logps), atol=2e-5, rtol=1e-5)
        assert not scores.logps_BT[row, len(s.ids) :].any()


def test_greedy_equals_transformers_generate(tiny_policy: Policy, studies: list[Study]) -> None:
    with torch.no_grad():  # a policy with something to say, and some end of turn in reach
        tiny_policy.model.lm_head.weight.mul_(8)
    reports = sample(tiny_policy, studies, group=1, temperature=0.0)
    for study, group in zip(studies, reports, strict=True):
        prompt = tiny_policy.encode(study)
        out = tiny_policy.model.generate(
            input_ids=prompt.ids_P[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            mm_token_type_ids=prompt.types_P[None],
            **prompt.images,
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=list(tiny_policy.banned_ids),
        )
        assert out[0, len(prompt) :].tolist() == list(group[0].ids)


def test_placeholders_are_never_sampled(tiny_policy: Policy, studies: list[Study]) -> None:
    banned = list(tiny_policy.banned_ids)
    assert len(banned) == 2
    with torch.no_grad():  # now the policy would like nothing better than an image token
        weight = tiny_policy.model.lm_head.weight
        weight[banned] = 3 * weight.abs().max() * torch.sign(weight[banned])
    groups = sample(tiny_policy, studies, group=16)
    assert not {i for group in groups for s in group for i in s.ids} & set(banned)


def test_truncation_and_end_of_turn(tiny_policy: Policy, studies: list[Study]) -> None:
    for group in sample(tiny_policy, studies, tokens=3):
        for s in group:
            assert s.truncated == (s.ids[-1] != tiny_policy.eos_id)
            assert len(s.ids) == len(s.logps) <= 3
    ends = tiny_policy.eos_id
    with torch.no_grad():  # every token alike, and the end of turn ten times as likely as any other
        tiny_policy.model.lm_head.weight.zero_()
        tiny_policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_policy.processor.tokenizer)))
        tiny_policy.model.lm_head.bias[ends] = 3.0
    groups = sample(tiny_policy, studies, group=16, tokens=60)
    lengths = [len(s.ids) for group in groups for s in group]
    assert len(set(lengths)) > 10  # rows finished at different steps, and left the batch
    again = sample(tiny_policy, studies[1:2], group=16, tokens=60)[0]
    assert [s.ids for s in again] == [s.ids for s in groups[1]]


def test_each_prompt_is_prefilled_once(
    tiny_policy: Policy, studies: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, calls = [], []
    original = tiny_policy.model.model.get_image_features
    monkeypatch.setattr(
        tiny_policy.model.model,
        "get_image_features",
        lambda pixels, grids, **kw: encoded.append(len(grids)) or original(pixels, grids, **kw),
    )
    tiny_policy.model.register_forward_pre_hook(lambda m, a, kw: calls.append(kw["input_ids"].shape), with_kwargs=True)
    sample(tiny_policy, studies, group=8)
    assert encoded == [5]  # five films of four studies
    assert calls[0][0] == 4 and {shape[1] for shape in calls[1:]} == {1}


def test_generate_reports_in_order(tiny_policy: Policy, studies: list[Study]) -> None:
    seen: list[int] = []
    reports = generate_reports(tiny_policy, studies, max_new_tokens=5, batch_size=3, progress=seen.append)
    assert [r.id for r in reports] == [s.id for s in studies] and seen == [3, 4]
    one_by_one = generate_reports(tiny_policy, studies, max_new_tokens=5, batch_size=1)
    assert [r.text for r in reports] == [r.text for r in one_by_one]
