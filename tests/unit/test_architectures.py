"""The same code drives many families: plain positions and repeated pixels (LLaVA), windowed vision (Qwen2.5-VL)."""

from pathlib import Path

import pytest
import torch
import transformers

from tests import families
from unirg.errors import UserError
from unirg.grpo.forward import answer_logps
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig, build_messages
from unirg.rollout.hf import HFSampler
from unirg.study import Study
from unirg.tiny import IMAGE, TURN_END

FAMILIES = (
    families.llava,
    families.llava_mistral,
    families.qwen2_vl,
    families.qwen2_5_vl,
    families.qwen3_vl_moe,
    families.gemma3,
    families.idefics3,
    families.smolvlm,
)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda build: build.__name__)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return load_policy(PolicyConfig(model=str(folder)), PromptConfig(style="short"))


def test_sampled_log_probs_are_those_of_training(policy: Policy, studies: list[Study]) -> None:
    prompts = [policy.encode(study) for study in studies]
    seeds = [[10 * i + g for g in range(3)] for i in range(len(studies))]
    groups = HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=8)
    scores = answer_logps(policy, prompts, [[s.ids for s in group] for group in groups])
    for row, s in enumerate(s for group in groups for s in group):
        torch.testing.assert_close(scores.logps_BT[row, : len(s.ids)], torch.tensor(s.logps), atol=2e-5, rtol=1e-5)
    scores.logps_BT.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)


def test_the_prompt_is_read_as_the_model_by_hand_reads_it(policy: Policy, studies: list[Study]) -> None:
    text = policy.processor.apply_chat_template(build_messages(studies[3], policy.prompt), add_generation_prompt=True)
    films = [image.load() for image in studies[3].images]
    with torch.no_grad():
        logits_V = policy.model.eval()(**policy.processor(text=[text], images=films, return_tensors="pt")).logits[0, -1]
    logits_V[list(policy.banned_ids)] = float("-inf")
    prompt = policy.encode(studies[3])
    first = HFSampler(policy).sample([prompt], [[0]], temperature=0.0, max_new_tokens=1)[0][0]
    assert first.logps[0] == pytest.approx(float(logits_V.log_softmax(-1).max()), abs=1e-5)
    trained = answer_logps(policy, [prompt], [[first.ids]]).logps_BT
    assert trained[0, 0].item() == pytest.approx(first.logps[0], abs=1e-5)


def test_the_film_matters(policy: Policy, studies: list[Study]) -> None:
    same_text = [studies[0], Study("other", studies[2].images, findings=studies[0].findings)]
    answers = [[policy.answer_ids("Small left pleural effusion.")]] * 2
    scores = answer_logps(policy, [policy.encode(study) for study in same_text], answers)
    assert not torch.allclose(scores.logps_BT[0], scores.logps_BT[1], atol=1e-6)


def test_the_family_keeps_its_processor(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    again = load_policy(PolicyConfig(model=str(tmp_path)), PromptConfig(style="short"))
    assert type(again.processor).__name__ == type(policy.processor).__name__
    assert isinstance(again.model, getattr(transformers, type(policy.model).__name__))


def test_every_family_ends_its_turns(policy: Policy) -> None:
    assert policy.answer_ids("The lungs are clear.")[-1] == policy.processor.tokenizer.convert_tokens_to_ids(TURN_END)
    assert policy.eos_id in policy.stop_ids
    assert policy.eos_id not in policy.answer_ids(f"The lungs {TURN_END} are {IMAGE} clear.")[:-1]


def test_studies_with_and_without_films_in_one_batch(policy: Policy, studies: list[Study]) -> None:
    mixed = [studies[0], Study("text", indication="cough", findings="The lungs are clear."), studies[3]]
    prompts = [policy.encode(study) for study in mixed]
    groups = HFSampler(policy).sample(prompts, [[1, 2]] * 3, temperature=1.0, max_new_tokens=6)
    answers = [[s.ids for s in group] for group in groups]
    together = answer_logps(policy, prompts, answers).logps_BT
    for i in range(3):
        alone = answer_logps(policy, prompts[i : i + 1], answers[i : i + 1]).logps_BT
        torch.testing.assert_close(together[2 * i : 2 * i + 2, : alone.shape[1]], alone, atol=2e-5, rtol=1e-5)


def test_image_size_is_refused_where_the_tower_has_its_own(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    config = PolicyConfig(model=str(tmp_path), image_size=96)
    if "Qwen" in type(policy.processor).__name__:
        assert load_policy(config, PromptConfig()).processor.image_processor.size["longest_edge"] == 96 * 96
    else:
        with pytest.raises(UserError, match=r"policy\.image_size: .* has a fixed image size"):
            load_policy(config, PromptConfig())
