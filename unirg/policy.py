"""The policy: a vision-language model with its processor, or a text-only one with its tokenizer, loaded from a folder
or hub id, or built tiny; LoRA; freezing.

Everything that depends on a model's architecture stands here: how a study becomes token ids and pixels, where positions
go, which ids must never be sampled. Shapes: P prompt tokens, B rows, T tokens.
"""

import copy
import inspect
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from pydantic import Field, model_validator
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from unirg.distributed import is_sharded
from unirg.errors import UserError
from unirg.processor import (
    chat_text,
    load_processor,
    qwen_processor,
    reads_images,
    stop_ids,
    tokenizer_of,
    turn_end,
)
from unirg.prompt import PromptConfig, build_messages, prompt_images
from unirg.section import Section
from unirg.study import Study, StudyImage
from unirg.tiny import TinyConfig, build_image_processor, build_model, build_tokenizer

PROMPT_CACHE_BYTES = 2 << 30


class LoraConfig(Section):
    """Low-rank adapters (peft); merged into the weights when a stage ends."""

    rank: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: int = Field(32, gt=0)
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters; 0 keeps sampled and trained log-probs equal."""
    targets: str | list[str] = "all-linear"
    """Module names, or `all-linear`; the vision tower is left out where it is frozen."""


class PolicyConfig(Section):
    """The policy: `model` names a Hugging Face folder or hub id, `tiny` builds a small one here."""

    model: str | None = None
    """A folder, or a hub id, of a Hugging Face image-text-to-text model; or of a text-only causal language model, which
    reads studies without images, or with `prompt.images: false`."""
    tiny: TinyConfig | None = None
    """Builds a tiny Qwen3-VL with a tokenizer trained on the training reports."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights."""
    freeze_vision: bool = False
    """Leave the vision tower as it is in the sft and grpo stages; an error where there is none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward; weights and optimiser stay float32 under bfloat16 (autocast) unless LoRA is on."""
    attention: str = "sdpa"
    """Attention implementation: sdpa, eager, flash_attention_2, ... as transformers names them. Where a grpo stage
    shares prompts, that of its language model is SDPA, and `shared_prefix_kernel` in packed forwards."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""
    max_prompt_tokens: int = Field(4096, gt=0)
    """A longer prompt is an error that names the study, before any training."""
    image_size: int | None = Field(None, gt=0)
    """Resize films so that they have about this many pixels a side, for models that take any size (Qwen's); default
    what the model's processor does."""
    trust_remote_code: bool = False
    """Run code that comes with the model's files."""

    @model_validator(mode="after")
    def _one_source(self) -> "PolicyConfig":
        if (self.model is None) == (self.tiny is None):
            raise ValueError("policy: give either `model` (a folder or hub id) or `tiny` (sizes), and not both")
        return self


@dataclass(frozen=True)
class EncodedPrompt:
    """One study's prompt, processed once: `ids_P` with expanded image tokens, `positions_3P` for mRoPE models (else
    None), `images` the processor's image tensors (first dimension: patches or images), `types_P` modality of each
    token."""

    study_id: str
    ids_P: torch.Tensor
    positions_3P: torch.Tensor | None
    types_P: torch.Tensor | None
    images: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.ids_P)

    @property
    def next_position(self) -> int:
        """The position of the first answer token: for mRoPE one more than the largest so far, on all three axes."""
        return len(self) if self.positions_3P is None else int(self.positions_3P.max()) + 1


@dataclass
class Policy:
    """A model with its processor (a text-only model's is its tokenizer) and what sampling and training must know of
    them.

    `eos_id` ends a turn in the model's chat template: reports are taught with it. `stop_ids` are all ids that end a
    sampled report, `eos_id` among them. `banned_ids` are image and video placeholders: a sampled one makes the next
    forward look for an image that is not there, so they are removed from the softmax in sampling and in training alike.
    """

    model: Any
    processor: Any
    prompt: PromptConfig
    config: PolicyConfig
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    banned_ids: tuple[int, ...]
    blank: EncodedPrompt | None = None
    """A prompt with a blank film, set where weights are sharded: ranks put the layers together, those of the vision
    tower too, so that all must call them, and a rank whose forward has no film takes this one."""
    engine: Any = None
    """DeepSpeed's engine around the model, where `zero3` shards it: forwards that may be trained go through it."""
    _cache: "OrderedDict[int, tuple[Study, EncodedPrompt, int]]" = field(default_factory=OrderedDict)
    _cached_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def base(self) -> Any:
        """The transformers model inside adapter wrappers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    @property
    def reads_images(self) -> bool:
        """Whether the model takes images beside text."""
        return reads_images(self.processor)

    @property
    def forward_takes(self) -> Mapping[str, inspect.Parameter]:
        """The keywords of the model's forward, as its class declares them (instances may be wrapped by autocast)."""
        return inspect.signature(type(self.base).forward).parameters

    def encode(self, study: Study) -> EncodedPrompt:
        """The study's prompt, processed once and kept (up to 2 GiB of prompts, the oldest go first).

        Raises UserError naming the study for a film that cannot be read, for one before a text-only policy, and for a
        prompt that is too long.
        """
        kept = self._cache.get(id(study))
        if kept is not None:
            return kept[1]
        prompt = self._encode(study)
        size = sum(t.numel() * t.element_size() for t in prompt.images.values()) + 64 * len(prompt)
        self._cache[id(study)] = (study, prompt, size)  # holding the study keeps its id() from being reused
        self._cached_bytes += size
        while self._cached_bytes > PROMPT_CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][2]
        return prompt

    def _encode(self, study: Study) -> EncodedPrompt:
        sources = prompt_images(study, self.prompt)
        if sources and not self.reads_images:
            raise UserError(
                f"study {study.id}: its prompt has {len(sources)} image{'s' * (len(sources) > 1)}, and "
                f"{type(self.base).__name__} reads text only; set prompt.images=false to leave images out, or name an "
                "image-text-to-text model in policy.model"
            )
        try:
            images = [image.load() for image in sources]
        except OSError as error:
            raise UserError(f"study {study.id}: {error}") from error
        text = chat_text(self.processor, build_messages(study, self.prompt), add_generation_prompt=True)
        bos = self.tokenizer.bos_token  # in the template already, or put there by the tokenizer: not twice
        special = self.reads_images and not (bos and text.startswith(bos))  # templates of text models are complete
        try:
            encoded = dict(
                self.processor(
                    text=[text],
                    return_tensors="pt",
                    add_special_tokens=special,
                    **({"images": images} if images else {}),
                )
            )
        except ValueError as error:  # such as an image placeholder within the study's text
            raise UserError(f"study {study.id}: the processor does not take its prompt ({error})") from error
        ids_P = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask", None)
        types = encoded.pop("mm_token_type_ids", encoded.pop("token_type_ids", None))
        types_P = None if types is None else types[0]
        if len(ids_P) > self.config.max_prompt_tokens:
            raise UserError(
                f"study {study.id}: its prompt has {len(ids_P)} tokens, policy.max_prompt_tokens allows "
                f"{self.config.max_prompt_tokens}; shorten the context, lower policy.image_size or raise the limit"
            )
        positions_3P = None
        inner: Any = getattr(self.base, "model", None)
        if hasattr(inner, "get_rope_index"):
            if "image_grid_thw" in encoded:
                assert types_P is not None  # the processors of models with mRoPE return them
                positions, _ = inner.get_rope_index(
                    ids_P[None], mm_token_type_ids=types_P[None], image_grid_thw=encoded["image_grid_thw"]
                )
                positions_3P = positions[:, 0]
            else:
                positions_3P = torch.arange(len(ids_P)).expand(3, -1)
        return EncodedPrompt(study.id, ids_P, positions_3P, types_P, encoded)

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of a report and the end-of-turn token after it. A special token's name in the text stays text."""
        tokens = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [*tokens["input_ids"], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def image_inputs(self, prompts: Sequence[EncodedPrompt], rows: Sequence[int]) -> dict[str, Any]:
        """Image keywords for a forward over rows that belong to `prompts[i] for i in rows`.

        Where the model takes features (`mm_encoder_outputs`: the Qwen family in newer transformers) each image is
        encoded once and its features are shared by the rows; elsewhere, and where the parameters are sharded (the tower
        cannot then be called apart from the model), its pixels are repeated.
        """
        if not any(prompts[i].images for i in rows):
            return {}
        device = self.device
        names = next(p.images for p in prompts if p.images).keys()
        shareable = len(rows) > len(prompts) and set(names) == {"pixel_values", "image_grid_thw"}
        if shareable:
            shareable = not is_sharded(self.model)
        if shareable and "mm_encoder_outputs" in self.forward_takes:
            grids = torch.cat([p.images["image_grid_thw"] for p in prompts if p.images]).to(device)
            pixels = torch.cat([p.images["pixel_values"] for p in prompts if p.images]).to(device)
            features = self.base.model.get_image_features(pixels, grids, return_dict=True)
            first, spans = 0, []
            for prompt in prompts:
                count = len(prompt.images.get("image_grid_thw", ()))
                spans.append(range(first, first + count))
                first += count
            order = [k for i in rows for k in spans[i]]
            features.pooler_output = [features.pooler_output[k] for k in order]
            if getattr(features, "deepstack_features", None) is not None:
                features.deepstack_features = [[layer[k] for k in order] for layer in features.deepstack_features]
            return {"mm_encoder_outputs": {"image": features}}
        return {
            name: _joined([prompts[i].images[name] for i in rows if prompts[i].images]).to(device) for name in names
        }

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face model folder (adapters merged), with its processor."""
        model = self.model
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder, safe_serialization=True)
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Writes the processor's part of a model folder."""
        self.processor.save_pretrained(folder)
        qwen = self.reads_images and "Qwen" in type(self.processor).__name__
        if qwen and not hasattr(self.processor, "video_processor"):
            # The video half, which needs torchvision, was never built; engines that serve the folder look for it.
            image = self.processor.image_processor
            settings = {"video_processor_type": "Qwen3VLVideoProcessor"}
            settings |= {name: getattr(image, name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
            (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))


def blank_prompt(policy: Policy) -> EncodedPrompt:
    """A prompt with one small black film: see `Policy.blank`."""
    return policy.encode(Study("blank", images=(StudyImage(np.zeros((64, 64), dtype=np.uint8)),)))


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors in one, along the first dimension; zeros fill up the others (numbers of images or tiles), which is how
    the processors themselves pad a batch."""
    widths = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padding = [[n for w, s in zip(widths[::-1], t.shape[:0:-1], strict=True) for n in (0, w - s)] for t in tensors]
    return torch.cat([torch.nn.functional.pad(t, p) if any(p) else t for t, p in zip(tensors, padding, strict=True)])


def load_policy(
    config: PolicyConfig,
    prompt: PromptConfig,
    *,
    texts: Iterable[str] = (),
    seed: int = 0,
    folder: Path | None = None,
) -> Policy:
    """Builds or loads the policy that `config` asks for; `folder`, where given, holds weights that a stage left.

    `texts` trains the tiny policy's tokenizer (prompts and reports). Raises UserError where the model cannot be found.
    """
    if config.tiny is not None or not sys.stderr.isatty():  # loads in no time; or fills a log
        transformers.utils.logging.disable_progress_bar()
    source = folder or config.model
    if source is None:
        assert config.tiny is not None
        tokenizer = build_tokenizer(texts, config.tiny.vocabulary)
        processor = qwen_processor(build_image_processor(config.tiny.image_size), tokenizer)
        model: Any = build_model(config.tiny, tokenizer, seed)
    else:
        try:
            processor = load_processor(str(source), trust_remote_code=config.trust_remote_code)
            loader = AutoModelForImageTextToText if reads_images(processor) else AutoModelForCausalLM
            model = loader.from_pretrained(
                source,
                dtype=torch.bfloat16 if config.lora and config.dtype == "bfloat16" else torch.float32,
                trust_remote_code=config.trust_remote_code,
            )
        except (OSError, ValueError, ImportError) as error:
            where = "" if Path(source).exists() else " is no folder, and"
            raise UserError(
                f"policy.model: '{source}'{where} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        if not getattr(processor, "chat_template", None):
            raise UserError(f"policy.model: '{source}' has no chat template; an instruction-tuned model is needed")
    name = type(model).__name__
    if not reads_images(processor) and "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UserError(
            f"policy.model: {name} takes no position_ids, and batches are padded on the left; not supported"
        )
    if config.image_size is not None:
        if not reads_images(processor):
            raise UserError(f"policy.image_size: {name} reads text only; leave policy.image_size out")
        if not hasattr(processor.image_processor, "merge_size"):  # the families whose `size` is a number of pixels
            raise UserError(
                f"policy.image_size: {type(processor).__name__} has a fixed image size; leave policy.image_size out"
            )
        pixels = config.image_size**2
        processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    try:
        model.set_attn_implementation(config.attention)
    except (ValueError, ImportError) as error:
        raise UserError(f"policy.attention: '{config.attention}' cannot be used: {error}") from error
    tower = vision_tower(model)
    if config.freeze_vision:
        if tower is None:
            said = f"{name} has no visual, vision_tower or vision_model"
            raise UserError(f"policy.freeze_vision: {said}; leave policy.freeze_vision out")
        tower.requires_grad_(False)
    if config.lora is not None:
        model = with_lora(model, config, seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = True
    tokenizer = tokenizer_of(processor)
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    banned = sorted({i for name in names if isinstance(i := getattr(model.config, name, None), int)})
    stops = stop_ids(model, tokenizer)
    if not stops:
        raise UserError(f"policy.model: '{source}' names no end-of-sequence token; its reports would never end")
    end = turn_end(processor, stops)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    return Policy(model, processor, prompt, config, end, stops, int(pad), tuple(banned))


def vision_tower(model: Any) -> Any | None:
    """The vision tower of a transformers model, by the names that its families use; None where there is none."""
    for holder in (getattr(model, "model", None), model):
        for name in ("visual", "vision_tower", "vision_model"):
            if hasattr(holder, name):
                return getattr(holder, name)
    return None


def with_lora(model: Any, config: PolicyConfig, seed: int) -> Any:
    """`model` with fresh adapters on its linear layers, the same for the same seed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("policy.lora needs peft: pip install 'unirg[lora]'") from error
    assert config.lora is not None
    settings = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.targets,
        exclude_modules=r".*(visual|vision_tower|vision_model).*" if config.freeze_vision else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)
