"""Tiny random models of many families, each written as an ordinary Hugging Face folder in about a tenth of a second.

Weights are drawn wide (`draw`), so that attention has opinions: a wrong position or a wrong mask moves log-probs by far
more than rounding does. All prompts are longer than the sliding windows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from unirg.tiny import IMAGE, TURN_END, VIDEO, VISION_END, VISION_START, build_image_processor, build_tokenizer

Builder = Callable[[Path], None]

TEXTS = ("Small left pleural effusion.", "The lungs are clear.", "indication: cough; write findings")
WINDOW = 8

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN_VISION = {"num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}


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


def draw(model: Any, seed: int = 0) -> Any:
    """The model with every matrix redrawn, ones that adapters start at zero too; at width 64 this std keeps about a
    unit variance through a layer."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15, generator=generator)
    return model


def image_ids(tokenizer: Any) -> dict[str, int]:
    """Qwen's names for the ids of its placeholders."""
    tokens = {"image_token": IMAGE, "video_token": VIDEO, "vision_start_token": VISION_START}
    tokens["vision_end_token"] = VISION_END
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def save_qwen(folder: Path, tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    assert tokenizer.eos_token == TURN_END
    draw(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor(64).save_pretrained(folder)


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)} | more
    return {"rope_parameters": parameters}


def qwen2_vl(folder: Path) -> None:
    """Its second layer with a sliding window."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    tokenizer = build_tokenizer(TEXTS, 400)
    config = Qwen2VLConfig(
        text_config=text_sizes(tokenizer) | window | mrope(4, 6, 6),
        vision_config=QWEN_VISION | {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        tie_word_embeddings=True,
        **image_ids(tokenizer),
    )
    save_qwen(folder, tokenizer, Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl(folder: Path) -> None:
    """A vision tower that attends in windows."""
    tokenizer = build_tokenizer(TEXTS, 400)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 64}
    config = Qwen2_5_VLConfig(
        text_config=text_sizes(tokenizer) | mrope(4, 6, 6),
        vision_config=QWEN_VISION | vision | {"fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **image_ids(tokenizer),
    )
    save_qwen(folder, tokenizer, Qwen2_5_VLForConditionalGeneration(config))


QWEN3_VISION = QWEN_VISION | {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


def qwen3_vl(folder: Path) -> None:
    """Interleaved mRoPE, and image features added again after the language model's first layer (deepstack)."""
    tokenizer = build_tokenizer(TEXTS, 400)
    config = Qwen3VLConfig(
        text_config=text_sizes(tokenizer) | {"head_dim": 32} | mrope(6, 5, 5, mrope_interleaved=True),
        vision_config=QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
        **image_ids(tokenizer),
    )
    save_qwen(folder, tokenizer, Qwen3VLForConditionalGeneration(config))


def qwen3_vl_moe(folder: Path) -> None:
    """As qwen3_vl, each token through two of four experts."""
    tokenizer = build_tokenizer(TEXTS, 400)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3VLMoeConfig(
        text_config=text_sizes(tokenizer) | {"head_dim": 32} | experts | mrope(6, 5, 5, mrope_interleaved=True),
        vision_config=QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
        **image_ids(tokenizer),
    )
    save_qwen(folder, tokenizer, Qwen3VLMoeForConditionalGeneration(config))


def qwen3_5(folder: Path) -> None:
    """Layers with linear attention, whose state runs through the whole row."""
    tokenizer = build_tokenizer(TEXTS, 400)
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    linear = heads | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    rope = mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25)
    config = Qwen3_5Config(
        text_config=text_sizes(tokenizer) | {"head_dim": 32} | linear | rope,
        vision_config=QWEN3_VISION,
        tie_word_embeddings=True,
        **image_ids(tokenizer),
    )
    save_qwen(folder, tokenizer, Qwen3_5ForConditionalGeneration(config))


def save_llava(folder: Path, tokenizer: PreTrainedTokenizerFast, text_config: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(VISION_START, "").replace(VISION_END, "")
    tokenizer.image_token = IMAGE
    config = LlavaConfig(
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
        vision_config=CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}),
        text_config=text_config,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    draw(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def llava(folder: Path) -> None:
    """Plain positions; pixels, not features, are repeated by the dense path."""
    tokenizer = build_tokenizer(TEXTS, 400)
    save_llava(folder, tokenizer, LlamaConfig(**text_sizes(tokenizer), head_dim=32))


def llava_mistral(folder: Path) -> None:
    """As llava, every layer with a sliding window."""
    tokenizer = build_tokenizer(TEXTS, 400)
    save_llava(folder, tokenizer, MistralConfig(**text_sizes(tokenizer), head_dim=32, sliding_window=WINDOW))


def gemma3(folder: Path) -> None:
    """Sliding window, image tokens that attend both ways (more of them than the window holds), and an end of turn that
    only the generation config names."""
    tokenizer = build_tokenizer(TEXTS, 400)
    tokenizer.chat_template = tokenizer.chat_template.replace(VISION_END, "").replace(IMAGE, "")
    tokenizer.eos_token = tokenizer.pad_token
    index: Any = tokenizer.convert_tokens_to_ids
    tokens = {"boi_token": VISION_START, "eoi_token": VISION_END, "image_token": IMAGE}
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens)
    config = Gemma3Config(
        text_config=text_sizes(tokenizer)
        | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION,
        mm_tokens_per_image=16,
        image_token_index=index(IMAGE),
        boi_token_index=index(VISION_START),
        eoi_token_index=index(VISION_END),
    )
    model = draw(Gemma3ForConditionalGeneration(config))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, index(TURN_END)]
    model.save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=16,
    ).save_pretrained(folder)


def save_tiles(folder: Path, config_class: Any, model_class: Any) -> None:
    """A row of tiles per study, as many as its films have: batches are padded."""
    tokenizer = build_tokenizer(TEXTS, 400)
    template = tokenizer.chat_template.replace(VISION_START, "").replace(VISION_END, "").replace(IMAGE, "<image>")
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    config = config_class(
        text_config=text_sizes(tokenizer) | {"model_type": "llama"},
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    draw(model_class(config)).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template,
    ).save_pretrained(folder)


def idefics3(folder: Path) -> None:
    save_tiles(folder, Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm(folder: Path) -> None:
    """With Idefics3's processor: SmolVLM's own needs torchvision for its video half."""
    save_tiles(folder, SmolVLMConfig, SmolVLMForConditionalGeneration)


def paligemma(folder: Path) -> None:
    """A prompt whose tokens all attend to each other (prefix-LM)."""
    tokenizer = build_tokenizer(TEXTS, 400)
    tokenizer.chat_template = tokenizer.chat_template.replace(VISION_START, "").replace(VISION_END, "")
    tokenizer.chat_template = tokenizer.chat_template.replace(IMAGE, "<image>")
    tokenizer.bos_token = VISION_START
    processor = PaliGemmaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=16),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    config = PaliGemmaConfig(
        text_config=text_sizes(tokenizer) | {"model_type": "gemma", "head_dim": 32},
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 64, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
    )
    draw(PaliGemmaForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_text(folder: Path, config_class: Any, model_class: Any, **more: Any) -> None:
    """A causal language model with its tokenizer: no image processor, no processor."""
    tokenizer = build_tokenizer(TEXTS, 400)
    model = draw(model_class(config_class(**text_sizes(tokenizer) | {"head_dim": 32} | more)))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama(folder: Path) -> None:
    save_text(folder, LlamaConfig, LlamaForCausalLM)


def mistral(folder: Path) -> None:
    save_text(folder, MistralConfig, MistralForCausalLM, sliding_window=WINDOW)


def qwen2(folder: Path) -> None:
    """Its second layer with a sliding window."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    save_text(folder, Qwen2Config, Qwen2ForCausalLM, **window)


def qwen3(folder: Path) -> None:
    save_text(folder, Qwen3Config, Qwen3ForCausalLM)


def gemma3_text(folder: Path) -> None:
    window = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    window["query_pre_attn_scalar"] = 32
    save_text(folder, Gemma3TextConfig, Gemma3ForCausalLM, **window)


def gemma2(folder: Path) -> None:
    """Attention scores and logits that are capped by a tanh."""
    save_text(folder, Gemma2Config, Gemma2ForCausalLM, sliding_window=WINDOW)
