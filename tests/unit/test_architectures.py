"""The same code drives other families: plain positions and repeated pixels (LLaVA), windowed vision (Qwen2.5-VL)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from unirg.errors import UserError
from unirg.grpo.forward import answer_logps
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig, build_messages
from unirg.rollout.hf import HFSampler
from unirg.study import Study
from unirg.tiny import IMAGE, TURN_END, VIDEO, VISION_END, VISION_START, build_image_processor, build_tokenizer

TEXTS = ("Small left pleural effusion.", "The lungs are clear.", "indication: cough; write findings")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def text_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def llava(folder: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, 400)
    tokenizer.chat_template = tokenizer.chat_template.replace(VISION_START, "").replace(VISION_END, "")
    tokenizer.image_token = IMAGE
    config = LlavaConfig(
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
        vision_config=CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}),
        text_config=LlamaConfig(**text_sizes(tokenizer), head_dim=32),
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def qwen2_5_vl(folder: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, 400)
    index: Any = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=text_sizes(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 64,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
        image_token_id=index(IMAGE),
        video_token_id=index(VIDEO),
        vision_start_token_id=index(VISION_START),
        vision_end_token_id=index(VISION_END),
    )
    assert tokenizer.eos_token == TURN_END
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor(64).save_pretrained(folder)


def gemma3(folder: Path) -> None:
    """Sliding window, image tokens that attend both ways, and an end of turn that only the generation config names."""
    tokenizer = build_tokenizer(TEXTS, 400)
    tokenizer.chat_template = tokenizer.chat_template.replace(VISION_END, "").replace(IMAGE, "")
    tokenizer.eos_token = tokenizer.pad_token
    index: Any = tokenizer.convert_tokens_to_ids
    tokens = {"boi_token": VISION_START, "eoi_token": VISION_END, "image_token": IMAGE}
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens)
    config = Gemma3Config(
        text_config=text_sizes(tokenizer)
        | {"head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=index(IMAGE),
        boi_token_index=index(VISION_START),
        eoi_token_index=index(VISION_END),
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # else all zero
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, index(TURN_END)]
    model.save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    ).save_pretrained(folder)


def idefics3(folder: Path) -> None:
    """A row of tiles per study, as many as its films have: batches are padded. SmolVLM's family."""
    tokenizer = build_tokenizer(TEXTS, 400)
    template = tokenizer.chat_template.replace(VISION_START, "").replace(VISION_END, "").replace(IMAGE, "<image>")
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    config = Idefics3Config(
        text_config=text_sizes(tokenizer) | {"model_type": "llama"},
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template,
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=[llava, qwen2_5_vl, gemma3, idefics3], ids=lambda build: build.__name__)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
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
