"""The recipe's policy as shapes, and how long its prompts and reports are: from the data where they are there, else as
given."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from unirg.data import load_studies
from unirg.errors import UserError
from unirg.policy import PROMPT_CACHE_BYTES, EncodedPrompt, Policy, PolicyConfig, vision_tower, with_lora
from unirg.processor import is_text_only, load_processor, qwen_processor, tokenizer_of
from unirg.prompt import build_messages, report_text
from unirg.recipe.schema import Recipe
from unirg.study import Study
from unirg.tiny import build_image_processor, build_model, build_tokenizer

ALIKE = {"qwen2", "qwen3", "llama", "mistral", "qwen2_vl", "qwen3_vl"}
"""Families whose layers are all of one kind (Qwen2.5-VL's vision blocks are not: some attend within windows)."""
SAMPLE = 48
"""So many studies are encoded to learn lengths."""


@dataclass(frozen=True)
class Lengths:
    """A prompt of typical length, the longest one, report lengths in tokens (mean, longest), and where they are
    from."""

    prompt: EncodedPrompt
    longest_prompt: EncodedPrompt
    report: int
    longest_report: int
    source: str
    reading: float | None = None
    """Seconds that one process of this machine takes to read a study: its films, the processor, the tokenizer."""
    kept: int | None = None
    """How many studies there are, where a rank keeps all of them once it has read them."""


@dataclass(frozen=True)
class Given:
    """Lengths for a recipe whose data or tokenizer are not here: tokens of the prompt's text, films and their side in
    pixels, tokens of a report."""

    text: int = 200
    films: int = 1
    film_size: int = 512
    report: int = 120


def plan_policy(
    recipe: Recipe, config: Path | None, given: Given | None, clock: Callable[[], float] = time.perf_counter
) -> tuple[Policy, Lengths]:
    """The policy on the meta device, as stages train it (adapters, frozen tower), and its lengths. `given` lengths are
    used as they are; None takes the recipe's studies where they can be read, timed by `clock`.

    Raises UserError where there is no configuration of the model, or a film's size would have to be guessed.
    """
    settings = recipe.policy
    if config is not None and settings.tiny is not None:
        raise UserError(f"--config: the recipe builds its policy itself (policy.tiny); {config} would not be read")
    studies, why = _studies(recipe) if given is None else ([], "as given")
    if settings.tiny is not None:
        texts = [build_messages(study, recipe.prompt)[0]["content"][-1]["text"] for study in studies]
        texts += [report_text(study) for study in studies]
        tokenizer = build_tokenizer(texts, settings.tiny.vocabulary)
        processor: Any = qwen_processor(build_image_processor(settings.tiny.image_size), tokenizer)
        with torch.device("meta"):
            model: Any = build_model(settings.tiny, tokenizer, recipe.seed)
        architecture = model.config
    else:
        source, local = _source(settings, config)
        architecture = _config(
            source, settings.trust_remote_code, local, "policy.model" if config is None else "--config"
        )
        processor = _processor(source, settings.trust_remote_code, local)
        if processor is None and studies:
            studies, why = [], f"{source} has no tokenizer here"
        if processor is not None and settings.image_size and hasattr(processor, "image_processor"):
            pixels = settings.image_size**2
            processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    policy = _policy(recipe, architecture, processor)
    if studies:
        return policy, _measured(policy, studies, clock)
    guess = given or Given()
    guess = replace(guess, film_size=settings.image_size or guess.film_size)
    if given is None:
        why += "; assumed lengths"
    return policy, _assumed(policy, guess, why)


def _policy(recipe: Recipe, architecture: Any, processor: Any) -> Policy:
    settings = recipe.policy
    auto = AutoModelForCausalLM if is_text_only(architecture) else AutoModelForImageTextToText
    half = settings.lora is not None and settings.dtype == "bfloat16"
    with torch.device("meta"):
        model = auto.from_config(architecture, dtype=torch.bfloat16 if half else torch.float32)
        model.set_attn_implementation(settings.attention if settings.attention in ("eager", "sdpa") else "sdpa")
        if settings.freeze_vision and (tower := vision_tower(model)) is not None:
            tower.requires_grad_(False)
        if settings.lora is not None:
            model = with_lora(model, settings, recipe.seed)
    eos = 0 if processor is None else int(tokenizer_of(processor).eos_token_id)
    return Policy(model, processor, recipe.prompt, settings, eos, (eos,), eos, ())


SHALLOW = 2
"""Layers of the language model in a shallow policy."""


def in_depth(recipe: Recipe, policy: Policy) -> list[tuple[Policy, float]]:
    """Policies whose costs add up, with these shares, to that of `policy`, in less time: every layer of a stack costs
    the same, so that two depths of each stack tell all others. `policy` itself where it is shallow, or its layers
    differ."""
    architecture = policy.base.config
    text, vision = architecture.get_text_config(), getattr(architecture, "vision_config", None)
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or [])
    base = {"text": SHALLOW, "vision": max(SHALLOW, deep)}
    depth = {"text": text.num_hidden_layers, "vision": getattr(vision, "depth", 0)}
    alike = len(set(getattr(text, "layer_types", None) or ["one"])) == 1 and architecture.model_type in ALIKE
    if not alike or depth["text"] < 8 or 0 < depth["vision"] < 8:
        return [(policy, 1.0)]

    def shallow(**more: int) -> Policy:
        config = copy.deepcopy(architecture)
        own = config.get_text_config()
        own.num_hidden_layers = base["text"] + more.get("text", 0)
        if getattr(own, "layer_types", None):
            own.layer_types = own.layer_types[: own.num_hidden_layers]
        if vision is not None:
            config.vision_config.depth = base["vision"] + more.get("vision", 0)
            if deep:
                config.vision_config.deepstack_visual_indexes = list(range(deep))
        return _policy(recipe, config, policy.processor)

    stacks = [name for name in ("text", "vision") if depth[name]]
    extra = {name: depth[name] - base[name] for name in stacks}
    one_more = [(shallow(**{name: 1}), float(extra[name])) for name in stacks]
    return [(shallow(), 1.0 - sum(extra.values())), *one_more]


def _studies(recipe: Recipe) -> tuple[list[Study], str]:
    try:
        studies = load_studies(recipe.data, "train")
    except (UserError, OSError) as error:
        return [], f"the recipe's data are not here ({str(error).splitlines()[0]})"
    return studies, ""


def _source(settings: PolicyConfig, config: Path | None) -> tuple[str, bool]:
    """Where the model's files are: a folder, a file or a hub id; and whether only what is here may be asked for,
    because the hub does not answer. It is asked once: transformers asks six times for each file, with pauses.

    Raises UserError for what is neither here nor an id of the hub."""
    source = str(config or settings.model)
    if Path(source).exists():
        return source, False
    if config is not None:
        raise UserError(f"--config: '{source}': there is no such file or folder")
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except HfHubHTTPError:  # it answers; transformers says better what is wrong
        return source, False
    except ValueError as error:
        raise UserError(f"policy.model: '{source}': there is no such folder, and it is no id of the hub") from error
    except (HTTPError, OSError):
        return source, True
    return source, False


def _config(source: str, trust: bool, local: bool, key: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust, local_files_only=local)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if local:
            away = "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub does not answer"
            raise UserError(
                f"{key}: '{source}' is no folder here and not in the hub's cache, and {away}; name a "
                "folder with the model, or give its config.json with --config, or have it fetched where there is a "
                f"network: hf download {source} config.json"
            ) from error
        raise UserError(
            f"{key}: '{source}': no model configuration could be read ({str(error).splitlines()[0]}); name a folder "
            "with its config.json, or the file itself, with --config"
        ) from error


def _processor(source: str, trust: bool, local: bool) -> Any | None:
    """The processor, where the folder or the hub's cache has one: lengths can do without."""
    if Path(source).is_file():
        return None
    try:
        return load_processor(source, trust_remote_code=trust, local_files_only=local)
    except (OSError, ValueError, TypeError, ImportError, AttributeError):
        return None


def _measured(policy: Policy, studies: Sequence[Study], clock: Callable[[], float]) -> Lengths:
    few = list(studies[:: max(1, math.ceil(len(studies) / SAMPLE))])
    prompts, seconds = [], []
    for study in few:
        started = clock()
        prompts.append(policy.encode(study))
        seconds.append(clock() - started)
    prompts.sort(key=len)
    reports = sorted(len(policy.answer_ids(report_text(study))) for study in few)
    mean = sum(map(len, prompts)) / len(prompts)
    typical = min(prompts, key=lambda prompt: abs(len(prompt) - mean))
    held = sum(x.nbytes for prompt in prompts for x in prompt.images.values()) / len(prompts) * len(studies)
    return Lengths(
        typical,
        prompts[-1],
        round(sum(reports) / len(reports)),
        reports[-1],
        f"{len(few)} of the recipe's {len(studies)} training studies, reports as long as the references",
        statistics.median(seconds),
        len(studies) if held < PROMPT_CACHE_BYTES else None,
    )


def _assumed(policy: Policy, given: Given, why: str) -> Lengths:
    config = policy.base.config
    film = 0
    if given.films and policy.prompt.images and not is_text_only(config):
        if not hasattr(config, "image_token_id") or not hasattr(config.vision_config, "spatial_merge_size"):
            raise UserError(
                f"policy.model: how many tokens a film takes is not known for models of type {config.model_type}; give "
                "--config a folder with its processor, beside data that can be read"
            )
        film = max(1, given.film_size // (config.vision_config.patch_size * config.vision_config.spatial_merge_size))
    prompt = _text_and_films(policy, given.text, given.films if film else 0, film)
    return Lengths(prompt, prompt, given.report, 2 * given.report, f"{why}, the longest report twice the mean")


def _text_and_films(policy: Policy, text: int, films: int, side: int) -> EncodedPrompt:
    """A prompt of `text` words and films of `side` x `side` tokens."""
    config = policy.base.config
    if not films:
        ids_P = torch.zeros(text, dtype=torch.long)
        mrope = hasattr(policy.base, "model") and hasattr(policy.base.model, "get_rope_index")
        return EncodedPrompt("planned", ids_P, torch.arange(text).expand(3, -1) if mrope else None, None, {})
    vision, image = config.vision_config, config.image_token_id
    word = 0 if image else 1
    ids_P = torch.tensor(([config.vision_start_token_id] + [image] * side**2 + [word]) * films + [word] * text)
    types_P = (ids_P == image).long()
    grid = torch.tensor([[1, side * vision.spatial_merge_size, side * vision.spatial_merge_size]] * films)
    positions, _ = policy.base.model.get_rope_index(ids_P[None], mm_token_type_ids=types_P[None], image_grid_thw=grid)
    width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(int(grid.prod(1).sum()), width, device="meta")
    return EncodedPrompt("planned", ids_P, positions[:, 0], types_P, {"pixel_values": pixels, "image_grid_thw": grid})


def with_text(prompt: EncodedPrompt, tokens: int) -> EncodedPrompt:
    """A prompt of so many words alone, of the kind of `prompt`."""
    mrope = prompt.positions_3P is not None
    ids_P = torch.zeros(tokens, dtype=torch.long)
    return EncodedPrompt("planned", ids_P, torch.arange(tokens).expand(3, -1) if mrope else None, None, {})


def parameters(policy: Policy) -> dict[str, int]:
    """Parameters by part: vision tower, embeddings, language layers, head (0 where tied to the embeddings), adapters,
    and the rest (such as a projector)."""
    tower, base = vision_tower(policy.base), policy.base
    ids = {id(p): "vision tower" for p in (tower.parameters() if tower is not None else ())}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ids |= {id(p): "head" for p in (head.parameters() if head is not None else ())}
    ids |= {id(p): "embeddings" for p in embedding.parameters()}
    counts = dict.fromkeys(("vision tower", "embeddings", "language layers", "head", "adapters", "other"), 0)
    for name, p in policy.model.named_parameters():
        part = "adapters" if "lora_" in name else ids.get(id(p))
        counts[part or ("language layers" if ".layers." in name or ".norm." in name else "other")] += p.numel()
    return counts
