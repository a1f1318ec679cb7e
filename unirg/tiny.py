"""A tiny policy of the Qwen3-VL architecture, built here: random weights, a tokenizer trained on the corpus, no
downloads.

It exists for the demo, the tests and anyone's first run: the same classes, prompts and files as the real models have.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from unirg.section import Section

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO)

CHAT_TEMPLATE = (
    "{% for message in messages %}" + TURN_START + "{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + VISION_START + IMAGE + VISION_END + "{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + TURN_END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + TURN_START + "assistant\n{% endif %}"
)


class TinyConfig(Section):
    """Sizes of the tiny Qwen3-VL; the defaults have 1.4 million parameters."""

    vocabulary: int = Field(700, gt=300)
    """Upper bound of the tokenizer's size."""
    hidden: int = Field(128, gt=0)
    """Width of the language model."""
    layers: int = Field(3, gt=0)
    """Layers of the language model."""
    heads: int = Field(4, gt=0)
    """Attention heads of the language model; half as many key-value heads."""
    mlp: int = Field(384, gt=0)
    """Width of the language model's MLPs."""
    vision_hidden: int = Field(96, gt=0)
    """Width of the vision tower."""
    vision_layers: int = Field(3, gt=0)
    """Layers of the vision tower."""
    image_size: int = Field(96, gt=0, multiple_of=32)
    """Films are resized to about this many pixels a side: (size / 32)^2 image tokens."""


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Role words stand in every prompt: with a weight in the corpus they become single tokens.
    tokenizer.train_from_iterator([*texts, *["user\n", "assistant\n"] * 100], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[t for t in SPECIAL if t not in (TURN_END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        padding_side="left",
    )


def build_image_processor(image_size: int) -> Any:
    """Qwen's image processor on PIL (no torchvision); films come out at about `image_size` pixels a side."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = image_size * image_size
    return Qwen2VLImageProcessorPil(
        min_pixels=pixels,
        max_pixels=pixels,
        patch_size=16,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised tiny Qwen3-VL for `tokenizer`, in float32, the same for the same seed."""
    head = config.hidden // config.heads
    index: Any = tokenizer.convert_tokens_to_ids
    model_config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden,
            "intermediate_size": config.mlp,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": max(1, config.heads // 2),
            "head_dim": head,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": config.vision_layers,
            "hidden_size": config.vision_hidden,
            "intermediate_size": 2 * config.vision_hidden,
            "num_heads": max(1, config.vision_hidden // 32),
            "out_hidden_size": config.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": (config.image_size // 16) ** 2,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        image_token_id=index(IMAGE),
        video_token_id=index(VIDEO),
        vision_start_token_id=index(VISION_START),
        vision_end_token_id=index(VISION_END),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(model_config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model
