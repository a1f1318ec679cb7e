"""Every family whose prompts can be shared: a packed row gives what the dense path gives. The others are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import families
from tests.parity import Answers, assert_same, assert_same_scores, random_answers
from unirg.grpo import shared_prefix
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

LENGTHS = ([1, 9, 14], [20, 3], [7], [1, 1, 5])


def load(build: families.Builder, folder: Path) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(folder)
    if build not in (*TEXT, families.gemma2):
        return load_policy(PolicyConfig(model=str(folder)), PromptConfig(style="short"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Policy(
        model, None, PromptConfig(), PolicyConfig(model=str(folder)), eos_id=1, stop_ids=(1,), pad_id=0, banned_ids=()
    )


def encode(policy: Policy, studies: list[Study]) -> list[EncodedPrompt]:
    """Four prompts: with one film, two films, none, one; or of four lengths, where the model sees no films."""
    if policy.processor is None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(10, 250, (n,), generator=generator) for n in (14, 30, 9, 3)]
        return [EncodedPrompt(f"s{i}", ids_P, None, None, {}) for i, ids_P in enumerate(drawn)]
    text = Study("text", indication="cough", findings="The lungs are clear.")
    return [policy.encode(study) for study in (studies[0], studies[3], text, studies[1])]


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


def test_the_order_and_company_of_answers_do_not_matter(
    policy: Policy, prompts: list[EncodedPrompt], answers: Answers
) -> None:
    with torch.no_grad():
        together = packed_logps(policy, prompts, answers).logps_BT
        alone = packed_logps(policy, prompts[1:2], [answers[1][::-1]]).logps_BT
    torch.testing.assert_close(together[3:5], alone.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [families.qwen3_vl, families.gemma3, families.mistral], ids=lambda b: b.__name__)
def test_preparing_leaves_everything_else_as_it_was(
    build: families.Builder, tmp_path: Path, studies: list[Study]
) -> None:
    """The dense path to the last bit, sampling, and the folder that the policy is saved to."""
    policy = load(build, tmp_path / "before")
    prompts, answers = encode(policy, studies), random_answers(policy, LENGTHS)

    def sample() -> Any:
        seeds = [[10 * i, 10 * i + 1] for i in range(len(prompts))]
        return policy.processor and HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=6)

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
