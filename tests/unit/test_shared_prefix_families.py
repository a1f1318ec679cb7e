"""Every family whose prompts can be shared: a packed row gives what the dense path gives. The others are refused."""

import inspect
import itertools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

from tests import families
from tests.parity import LENGTHS, Answers, assert_same, assert_same_scores, random_answers
from unirg.grpo import prefix_attention, shared_prefix
from unirg.grpo.forward import answer_logps
from unirg.grpo.prefix_attention import PackedLayout, PackedStudy
from unirg.grpo.shared_prefix import packed_logps, packed_tokens, prepare
from unirg.policy import EncodedPrompt, Policy, PolicyConfig, load_policy, vision_tower
from unirg.prompt import PromptConfig
from unirg.rollout.hf import HFSampler
from unirg.study import Study

VISION = (
    families.llava,
    families.llava_mistral,
    families.qwen2_vl,
    families.qwen2_5_vl,
    families.qwen3_vl,
    families.qwen3_vl_moe,
    families.gemma3,
    families.idefics3,
    families.smolvlm,
)
TEXT = (families.llama, families.mistral, families.qwen2, families.qwen3, families.gemma3_text)
REFUSED = ((families.paligemma, "paligemma"), (families.qwen3_5, "qwen3_5"), (families.gemma2, "gemma2"))


def load(build: families.Builder, folder: Path) -> Policy:
    build(folder)
    prompt = PromptConfig(style="short", images=build not in (*TEXT, families.gemma2))
    attention = "eager" if build is families.gemma2 else "sdpa"  # transformers has no SDPA for Gemma 2
    return load_policy(PolicyConfig(model=str(folder), attention=attention), prompt)


def encode(policy: Policy, studies: list[Study]) -> list[EncodedPrompt]:
    """Prompts with one film, two films, none and one, and with text of several lengths."""
    told = "cough and fever for three days after travel, pneumonia suspected"
    text = Study("text", indication=told, findings="The lungs are clear.")
    prompts = [policy.encode(study) for study in (studies[0], studies[3], text, studies[1])]
    assert min(map(len, prompts)) > families.WINDOW and len(set(map(len, prompts))) > 2
    return prompts


@pytest.fixture(scope="module", params=VISION + TEXT, ids=lambda build: build.__name__)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    policy = load(request.param, tmp_path_factory.mktemp(request.param.__name__))
    assert prepare(policy) is None
    policy.model.train()
    return policy


@pytest.fixture(scope="module")
def prompts(policy: Policy, studies: list[Study]) -> list[EncodedPrompt]:
    return encode(policy, studies)


@pytest.fixture(scope="module")
def answers(policy: Policy) -> Answers:
    return random_answers(policy, LENGTHS)


def test_packed_equals_dense(policy: Policy, prompts: list[EncodedPrompt], answers: Answers) -> None:
    assert_same(policy, prompts, answers, packed_logps, answer_logps)


def test_the_temperature_is_that_of_the_dense_path(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers
) -> None:
    with torch.no_grad():
        ours = packed_logps(policy, prompts, answers, temperature=0.7)
        assert_same_scores(ours, answer_logps(policy, prompts, answers, temperature=0.7))
        assert not torch.allclose(ours.logps_BT, packed_logps(policy, prompts, answers).logps_BT, atol=1e-2)


def test_a_wrong_position_is_seen(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_logps(policy, prompts, answers)
    right = EncodedPrompt.next_position.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(EncodedPrompt, "next_position", property(lambda prompt: right(prompt) + 1))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_scores(packed_logps(policy, prompts, answers), expected)


def test_an_answer_that_sees_another_is_seen(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each study's answers as one: causal, positions right, but the second answer sees the first."""

    def leaky(studies: Sequence[PackedStudy], *rest: Any) -> PackedLayout:
        merged = (PackedStudy(s.start, s.prompt, (sum(s.answers),)) for s in studies)
        return PackedLayout(tuple(merged), *rest)

    monkeypatch.setattr(shared_prefix, "PackedLayout", leaky)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_scores(packed_logps(policy, prompts, answers), answer_logps(policy, prompts, answers))


def test_each_film_prompt_and_prediction_is_computed_once(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers
) -> None:
    """Sizes of what goes into the vision tower, into the language model and into its head, each called once."""
    tower, sizes = vision_tower(policy.model), []
    modules = [tower] * (tower is not None) + [policy.base.get_input_embeddings(), policy.base.get_output_embeddings()]

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).shape
        sizes.append(shape[:-1].numel() if module is modules[-1] else shape.numel())

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    with torch.no_grad():
        packed_logps(policy, prompts, answers)
    for hook in hooks:
        hook.remove()
    parts = [(len(prompt), list(map(len, own))) for prompt, own in zip(prompts, answers, strict=True)]
    films = [prompt.images["pixel_values"].numel() for prompt in prompts if prompt.images]
    assert sorted(sizes) == sorted([sum(films)] * (tower is not None) + [packed_tokens(parts), sum(map(sum, LENGTHS))])


def test_a_forgotten_window_or_image_block_is_seen(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a family has one; where it has none, there is nothing to forget."""
    expected = answer_logps(policy, prompts, answers)
    right, windows = prefix_attention._sdpa, set()

    def forgetful(layout: PackedLayout, *tensors: Any) -> torch.Tensor:
        windows.add(tensors[-1])
        return right(layout, *tensors[:-1], None)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_attention, "_sdpa", forgetful)
        without_window = packed_logps(policy, prompts, answers)
    with monkeypatch.context() as patch:
        patch.setattr(shared_prefix, "_image_blocks", lambda types_T: None)
        without_blocks = packed_logps(policy, prompts, answers)
    name = policy.base.config.get_text_config().model_type
    windowed = name in {"mistral", "qwen2", "qwen2_vl_text", "gemma3_text"}
    assert (windows - {None} == {families.WINDOW}) == windowed
    for scores, forgotten in ((without_window, windowed), (without_blocks, policy.base.config.model_type == "gemma3")):
        with pytest.raises(AssertionError, match="not close") if forgotten else nullcontext():
            assert_same_scores(scores, expected)


def test_the_order_and_company_of_answers_do_not_matter(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers
) -> None:
    with torch.no_grad():
        together = packed_logps(policy, prompts, answers).logps_BT
        alone = packed_logps(policy, prompts[1:2], [answers[1][::-1]]).logps_BT
    torch.testing.assert_close(together[3:5, : alone.shape[1]], alone.flip(0), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same(policy: Policy, prompts: list[EncodedPrompt], answers: Answers) -> None:
    """Its forward and its block mask; on a CPU it is not compiled and has no backward."""
    with torch.no_grad():
        flex = packed_logps(policy, prompts, answers, kernel="flex")
        assert_same_scores(flex, answer_logps(policy, prompts, answers))


REAL_VARLEN = inspect.signature(varlen.varlen_attn)


def varlen_by_hand(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, sequence by sequence: queries are aligned with the last of
    their keys, `window_size` is how far a query sees to the left (-1: all the way) and to the right of itself."""
    given = REAL_VARLEN.bind(*args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    queries, keys = call["cu_seq_q"].tolist(), call["cu_seq_k"].tolist()
    assert call["cu_seq_q"].dtype == call["cu_seq_k"].dtype == torch.int32
    assert queries[-1] == len(call["query"]) and keys[-1] == len(call["key"]) == len(call["value"])
    assert max(np.diff(queries)) == call["max_q"] and max(np.diff(keys)) == call["max_k"]
    left, right = call["window_size"]
    out = []
    for q, k in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        query, key, value = (x[slice(*ends)].transpose(0, 1) for x, ends in zip(given.args[:3], (q, k, k), strict=True))
        assert call.get("enable_gqa") or len(query) == len(key)
        if len(query) != len(key):
            key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * call["scale"]
        behind = (
            torch.arange(scores.shape[1])[:, None] + scores.shape[2] - scores.shape[1] - torch.arange(scores.shape[2])
        )
        seen = (behind >= -right) & ((behind <= left) | (left < 0))
        out.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("grouped", [True, False], ids=["heads shared", "keys repeated"])
def test_flash_attention_is_asked_for_the_same(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """Its sequences, windows and gradients, with a loop in the place of the kernel, which needs CUDA and is not run;
    where its signature says that query heads may share keys, and where it does not."""
    monkeypatch.setattr(varlen, "varlen_attn", wraps(varlen.varlen_attn)(varlen_by_hand) if grouped else varlen_by_hand)
    flash = partial(packed_logps, kernel="flash")
    if policy.base.config.model_type == "gemma3":
        with pytest.raises(ValueError, match="no two-way image blocks"):
            flash(policy, prompts, answers)
    else:
        assert_same(policy, prompts, answers, flash, answer_logps)


@pytest.mark.parametrize("build", [families.qwen3_vl, families.gemma3, families.mistral], ids=lambda b: b.__name__)
def test_preparing_leaves_everything_else_as_it_was(
    build: families.Builder, tmp_path: Path, studies: list[Study]
) -> None:
    """The dense path to the last bit, sampling, and the folder that the policy is saved to."""
    policy = load(build, tmp_path / "before")
    prompts, answers = encode(policy, studies), random_answers(policy, LENGTHS)

    def sample() -> Any:
        seeds = [[10 * i, 10 * i + 1] for i in range(len(prompts))]
        return HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=6)

    before, sampled = answer_logps(policy, prompts, answers), sample()
    assert prepare(policy) is None
    assert torch.equal(answer_logps(policy, prompts, answers).logps_BT, before.logps_BT)
    assert sample() == sampled
    policy.model.save_pretrained(tmp_path / "after")
    assert "shared_prefix" not in (tmp_path / "after" / "config.json").read_text()


@pytest.mark.parametrize(("build", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_other_families_are_refused_and_left_alone(build: families.Builder, name: str, tmp_path: Path) -> None:
    policy = load(build, tmp_path)
    model = policy.model.eval()
    ids = torch.arange(20, 50)[None]
    parts = [model.config, *(getattr(model.config, part) for part in model.config.sub_configs)]

    def state() -> list[Any]:
        return [json.dumps(model.config.to_dict(), default=str), *(part._attn_implementation for part in parts)]

    before, logits = state(), model(input_ids=ids).logits
    why = prepare(policy)
    assert why is not None and name in why and "\n" not in why
    assert state() == before
    assert torch.equal(model(input_ids=ids).logits, logits)
