"""The policy: encoding, errors that name the study, adapters, freezing, other architectures, saved folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from unirg.errors import UserError
from unirg.grpo.forward import answer_logps
from unirg.policy import LoraConfig, Policy, PolicyConfig, load_policy, vision_tower
from unirg.processor import stop_ids
from unirg.prompt import PromptConfig
from unirg.rollout.hf import HFSampler
from unirg.study import Study, StudyImage
from unirg.tiny import TinyConfig

PROMPT = PromptConfig(style="short")
TINY = TinyConfig(
    vocabulary=400, hidden=64, heads=2, layers=2, mlp=96, vision_hidden=32, vision_layers=2, image_size=64
)
REPORTS = ("Small left pleural effusion.", "The lungs are clear. No pneumothorax.", "Pacemaker in place.")


def logps(policy: Policy, studies: list[Study], group: int = 1) -> torch.Tensor:
    answers = [[policy.answer_ids(study.findings or "")] * group for study in studies]
    return answer_logps(policy, [policy.encode(study) for study in studies], answers).logps_BT


def test_saved_and_loaded_again(tiny_policy: Policy, studies: list[Study], tmp_path: Path) -> None:
    tiny_policy.save(tmp_path)
    again = load_policy(PolicyConfig(model=str(tmp_path)), PROMPT)
    assert torch.equal(logps(tiny_policy, studies), logps(again, studies))
    assert again.banned_ids == tiny_policy.banned_ids and again.eos_id == tiny_policy.eos_id


def test_batches_and_groups_score_like_single_rows(tiny_policy: Policy, studies: list[Study]) -> None:
    together = logps(tiny_policy, studies, group=3).view(4, 3, -1)
    for i, study in enumerate(studies):
        alone = logps(tiny_policy, [study])[0]
        for g in range(3):
            torch.testing.assert_close(together[i, g, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_shared_image_features_have_the_gradient_of_repeated_ones(tiny_policy: Policy, studies: list[Study]) -> None:
    def gradient(group: int) -> torch.Tensor:
        tiny_policy.model.zero_grad()
        if group:
            logps(tiny_policy, studies, group=group).sum().backward()
        else:  # one row at a time, each encoding its own image
            for study in studies:
                for _ in range(3):
                    logps(tiny_policy, [study]).sum().backward()
        return torch.cat([p.grad.flatten() for p in vision_tower(tiny_policy.model).parameters()])

    shared, repeated = gradient(3), gradient(0)
    assert torch.linalg.norm(shared - repeated) < 1e-5 * torch.linalg.norm(repeated)


def test_errors_name_the_study(tiny_policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study a: .*gone\.png"):
        tiny_policy.encode(Study("a", (StudyImage(tmp_path / "gone.png"),)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(UserError, match=r"study b: .*broken\.png: cannot be read as an image"):
        tiny_policy.encode(Study("b", (StudyImage(tmp_path / "broken.png"),)))
    small = load_policy(PolicyConfig(tiny=TINY, max_prompt_tokens=60), PROMPT, texts=REPORTS)
    with pytest.raises(UserError, match=r"study c: its prompt has \d+ tokens, policy.max_prompt_tokens allows 60"):
        small.encode(Study("c", (StudyImage(np.zeros((64, 64), np.uint8)),), indication="cough " * 60))
    with pytest.raises(UserError, match=r"policy\.model: 'no/where' is no folder, and cannot be loaded"):
        load_policy(PolicyConfig(model="no/where"), PROMPT)
    with pytest.raises(ValueError, match="either `model`"):
        PolicyConfig()


def test_frozen_vision_and_adapters(studies: list[Study], tmp_path: Path) -> None:
    frozen = load_policy(PolicyConfig(tiny=TINY, freeze_vision=True), PROMPT, texts=REPORTS)
    logps(frozen, studies).sum().backward()
    assert all(p.grad is None for p in vision_tower(frozen.model).parameters())
    config = PolicyConfig(tiny=TINY, lora=LoraConfig(rank=4), freeze_vision=True)
    adapted = load_policy(config, PROMPT, texts=REPORTS)
    names = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name and "visual" not in name for name in names)
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    trained = logps(adapted, studies)
    with adapted.model.disable_adapter():
        assert not torch.allclose(trained, logps(adapted, studies), atol=1e-3)
    adapted.save(tmp_path)
    merged = load_policy(PolicyConfig(model=str(tmp_path)), PROMPT)
    torch.testing.assert_close(logps(merged, studies), trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logps(adapted, studies), trained)  # saving left the adapters in place


def test_gradient_checkpointing_changes_no_gradient(studies: list[Study]) -> None:
    plain = load_policy(PolicyConfig(tiny=TINY), PROMPT, texts=REPORTS)
    config = PolicyConfig(tiny=TINY, gradient_checkpointing=True)
    other = load_policy(config, PROMPT, texts=REPORTS)
    other.model.load_state_dict(plain.model.state_dict())
    other.model.train()
    HFSampler(other).sample([other.encode(studies[0])], [[1, 2]], temperature=1.0, max_new_tokens=4)
    assert other.model.training and other.model.is_gradient_checkpointing
    for policy in (plain, other):
        logps(policy, studies).sum().backward()
    for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_adapters_start_alike(studies: list[Study]) -> None:
    config = PolicyConfig(tiny=TINY, lora=LoraConfig(rank=4))
    one, other = (load_policy(config, PROMPT, texts=REPORTS, seed=3).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = load_policy(config, PROMPT, texts=REPORTS, seed=4).model.state_dict()
    assert any(not torch.equal(one[name], third[name]) for name in one if "lora_A" in name)


def test_what_is_no_policy_is_said_in_a_line(tmp_path: Path) -> None:
    tiny = load_policy(PolicyConfig(tiny=TINY), PROMPT, texts=REPORTS)
    with pytest.raises(UserError, match=r"policy\.attention: 'fast' cannot be used"):
        load_policy(PolicyConfig(tiny=TINY, attention="fast"), PROMPT, texts=REPORTS)
    tiny.tokenizer.save_pretrained(tmp_path / "text")
    transformers.T5Config(vocab_size=400).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"policy\.model: '.*text' cannot be loaded"):
        load_policy(PolicyConfig(model=str(tmp_path / "text")), PROMPT)
    tiny.save(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_policy(PolicyConfig(model=str(tmp_path / "base")), PROMPT)


def test_every_stop_id_ends_a_report(tiny_policy: Policy, studies: list[Study]) -> None:
    other = tiny_policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tiny_policy.model.generation_config.eos_token_id = [tiny_policy.eos_id, other]
    assert stop_ids(tiny_policy.model, tiny_policy.tokenizer) == (tiny_policy.eos_id, other)
    tiny_policy.stop_ids = (tiny_policy.eos_id, other)
    with torch.no_grad():  # the other one alone is ever sampled
        tiny_policy.model.lm_head.weight.zero_()
        tiny_policy.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_policy.tokenizer)))
        tiny_policy.model.lm_head.bias[other] = 50.0
    sample = HFSampler(tiny_policy).sample([tiny_policy.encode(studies[0])], [[0]], temperature=1.0, max_new_tokens=5)
    assert sample[0][0].ids == (other,) and not sample[0][0].truncated


@pytest.mark.parametrize("in_template", [True, False])
def test_a_prompt_begins_once(tiny_policy: Policy, studies: list[Study], in_template: bool) -> None:
    tokenizer = tiny_policy.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    if in_template:  # as in Gemma's
        tiny_policy.processor.chat_template = "<|endoftext|>" + tiny_policy.processor.chat_template
    ids = tiny_policy.encode(studies[0]).ids_P.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
