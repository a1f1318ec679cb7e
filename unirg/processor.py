"""A model's processor: loading it, the chat template, the ids that end a turn.

A vision-language model's processor takes images beside text; a text-only model's is its tokenizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import is_torchvision_available

TODAY = "26 Jul 2024"
"""The day that prompts are written on where the template asks for a `date_string`. Llama 3.2's would take the day of
the run, so that a run that goes on tomorrow would have other prompts; this is the one that Llama 3.1's takes."""
MARK = "§"
"""A turn's text where only what the template puts after it is of interest: no letter, special tokens have those."""


def is_text_only(config: Any) -> bool:
    """Whether the model of a transformers configuration is a causal language model that takes no images."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_processor(source: str, *, trust_remote_code: bool = False, local_files_only: bool = False) -> Any:
    """The model's processor, or the tokenizer of a text-only one; Qwen's processor without its video half where
    torchvision, which that half needs, is not installed. With `local_files_only` the hub is not asked."""
    how = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    config = AutoConfig.from_pretrained(source, **how)
    if is_text_only(config):
        return AutoTokenizer.from_pretrained(source, **how)
    try:
        return AutoProcessor.from_pretrained(source, **how)
    except (ImportError, ValueError, TypeError):
        if is_torchvision_available():
            raise
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
        image_processor = AutoImageProcessor.from_pretrained(source, **how)
        if not type(image_processor).__name__.startswith("Qwen"):
            raise
        return qwen_processor(image_processor, tokenizer, config.model_type)


def qwen_processor(image_processor: Any, tokenizer: Any, family: str = "qwen3_vl") -> Any:
    """Qwen's own processor for text and images, built without a video processor."""
    older = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}
    parent = older.get(family, transformers.Qwen3VLProcessor)

    class ImageOnlyProcessor(parent):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnlyProcessor.__name__ = parent.__name__  # the name that save_pretrained writes
    return ImageOnlyProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def reads_images(processor: Any) -> bool:
    """Whether this is the processor of a model that takes images: a text-only model's is a tokenizer."""
    return not isinstance(processor, PreTrainedTokenizerBase)


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer, which is the processor itself where it takes no images."""
    return processor.tokenizer if reads_images(processor) else processor


def chat_text(processor: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    """The messages in the model's chat template, special tokens written out.

    Templates of text-only models take a message as one string, not as a list of parts.
    """
    if not reads_images(processor):
        messages = [
            {**message, "content": "\n".join(part["text"] for part in message["content"])} for message in messages
        ]
    dated = {"date_string": TODAY} if "date_string" in processor.chat_template else {}
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **dated)


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends generation: the tokenizer's end of sequence first, then those of the generation config
    (Gemma's end of turn, Qwen's end of text)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    also = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(int(i) for i in (tokenizer.eos_token_id, *also) if i is not None))


def turn_end(processor: Any, stops: Sequence[int]) -> int:
    """The stop id that the chat template puts after an assistant's turn; the first of `stops` where it puts none."""
    turns = [{"role": role, "content": [{"type": "text", "text": MARK}]} for role in ("user", "assistant")]
    text = chat_text(processor, turns, add_generation_prompt=False)
    after = tokenizer_of(processor)(text.rpartition(MARK)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in after if i in stops), stops[0])
