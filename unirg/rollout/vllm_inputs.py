"""Prompts and samples on their way to vLLM and back, the same for a colocated engine and a server.

vLLM gets the trainer's own token ids, image tokens expanded, and the trainer's own pixels, each image placed at its run
of image tokens. Its processor never sees a prompt, so it can neither expand image tokens a second time nor resize a
film differently; and what it reports to have read is compared with what the trainer trains on, request by request.
"""

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from unirg.errors import UserError
from unirg.policy import EncodedPrompt, Policy
from unirg.rollout.sampler import Sample

NEVER = -1e9
"""Added to the logits of banned tokens: float32's exponential of it is 0, as where the trainer leaves them out."""


def require_vllm() -> None:
    """Settles what vLLM reads from the environment. Raises UserError where it is not installed."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where the weights are
        "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks and stages side by side would be bound to the same cores
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        how = "pip install 'unirg[vllm]', or set rollout.engine=hf"
        raise UserError(f"rollout.engine: vllm cannot be used ({error}); {how}") from error


def vllm_version() -> str:
    """Of the vLLM that is installed here, whatever device it was built for."""
    import vllm

    return str(vllm.__version__.partition("+")[0])


def architecture(policy: Policy) -> str:
    """The class of the policy's model; sharding mixes another into it."""
    return next(kind.__name__ for kind in type(policy.base).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def model_source(policy: Policy) -> Iterator[str]:
    """A folder, or hub id, from which vLLM can learn the policy's architecture. A policy that was built here has none:
    its config and processor are written to a folder that goes again."""
    if policy.base.name_or_path:
        yield str(policy.base.name_or_path)
        return
    config = copy.deepcopy(policy.base.config)
    config.architectures = [architecture(policy)]  # which only the saving of weights writes down
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        policy.save_processor(Path(folder))
        yield folder


def image_runs(ids: Sequence[int], image_ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first, length) of each run of image tokens."""
    runs, place = [], 0
    for is_image, tokens in groupby(ids, lambda token: token in image_ids):
        length = len(list(tokens))
        if is_image:
            runs.append((place, length))
        place += length
    return runs


class PromptInputs:
    """Makes vLLM's inputs of encoded prompts. `processor` is vLLM's for the model: it alone knows which tensors of the
    Hugging Face processor belong to one image; None for a text-only model."""

    def __init__(self, policy: Policy, processor: Any | None) -> None:
        self.processor = processor
        config = policy.model.config
        names = ("image_token_id", "image_token_index")
        self.image_ids = [i for name in names if isinstance(i := getattr(config, name, None), int)]
        self.dtype = getattr(torch, policy.config.dtype)

    def images(self, prompt: EncodedPrompt) -> tuple[list[Any], list[str], list[tuple[int, int]]]:
        """The prompt's images, each as vLLM's item, with its hash and its run of image tokens."""
        if not prompt.images:
            return [], [], []
        from transformers import BatchFeature
        from vllm.multimodal.inputs import MultiModalKwargsItems

        assert self.processor is not None
        # Floats as the tower will read them: half the bytes under bfloat16.
        inputs = BatchFeature(
            {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in prompt.images.items()}
        )
        items = MultiModalKwargsItems.from_hf_inputs(inputs, self.processor._get_mm_fields_config(inputs, {}))["image"]
        runs = image_runs(prompt.ids_P.tolist(), self.image_ids)
        if len(runs) != len(items):
            raise UserError(
                f"study {prompt.study_id}: its prompt has {len(items)} images and {len(runs)} runs of image tokens; "
                "vLLM rollouts need one run an image, as Qwen's and LLaVA's prompts have: set rollout.engine=hf"
            )
        return list(items), [_digest(item) for item in items], runs

    def engine_input(self, prompt: EncodedPrompt) -> Any:
        """The prompt for an engine in this process."""
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        items, hashes, runs = self.images(prompt)
        if not items:
            return tokens_input(prompt.ids_P.tolist())
        return mm_input(
            prompt_token_ids=prompt.ids_P.tolist(),
            mm_kwargs=MultiModalKwargsItems({"image": items}),
            mm_hashes={"image": hashes},
            mm_placeholders={"image": [PlaceholderRange(offset=first, length=length) for first, length in runs]},
        )

    def request(self, prompt: EncodedPrompt) -> dict[str, Any]:
        """The prompt as JSON for a server's /inference/v1/generate."""
        body: dict[str, Any] = {"token_ids": prompt.ids_P.tolist(), "return_token_ids": True}
        items, hashes, runs = self.images(prompt)
        if items:
            from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

            body["features"] = {
                "mm_hashes": {"image": hashes},
                "mm_placeholders": {"image": [{"offset": first, "length": length} for first, length in runs]},
                "kwargs_data": {"image": [encode_mm_kwargs_item(item) for item in items]},
            }
        return body


def _digest(item: Any) -> str:
    """Of an image's tensors: vLLM keeps an image's features, and the keys and values behind them, under this name."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(item):
        tensor = item[name].data
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sampling_parameters(
    policy: Policy, seeds: Sequence[int], temperature: float, max_new_tokens: int
) -> dict[str, Any]:
    """Of one request for a study's whole group: the plain softmax at the temperature, without banned tokens.

    Everything is said that a model's generation config could say otherwise. vLLM seeds the group's samples with
    consecutive numbers from the first seed; greedy samples are all one.
    """
    return {
        "n": len(seeds) if temperature else 1,
        "seed": seeds[0] >> 1,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": max_new_tokens,
        "min_tokens": 0,
        "ignore_eos": True,  # the policy's own list of stops is complete
        "stop_token_ids": list(policy.stop_ids),
        "logit_bias": {token: NEVER for token in policy.banned_ids},
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def context(policy: Policy, report: int) -> int:
    """Tokens of the longest prompt with a report of so many: what the recipe allows, and at most what the model takes,
    beyond which vLLM does not start."""
    takes = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
    allowed = policy.config.max_prompt_tokens + report
    return min(allowed, takes or allowed)


def check_length(prompt: EncodedPrompt, report: int, tokens: int) -> None:
    """Raises UserError where the prompt leaves less than a report's tokens of the context: vLLM would cut it short."""
    if len(prompt) + report > tokens:
        raise UserError(
            f"study {prompt.study_id}: its prompt has {len(prompt)} tokens, which leaves less than the {report} of a "
            f"report in the model's context of {tokens}; shorten the prompt, or lower the stage's "
            "sampling.max_new_tokens or evaluation.max_new_tokens"
        )


def check_prompt(prompt: EncodedPrompt, reported: Sequence[int] | None, where: str) -> None:
    """Raises UserError where vLLM read other token ids than the trainer trains on."""
    mine = prompt.ids_P.tolist()
    if reported is not None and list(reported) == mine:
        return
    if reported is None:
        what = "does not say which token ids it read"
    elif len(reported) != len(mine):
        what = f"read {len(reported)} token ids where the trainer has {len(mine)} (image tokens expanded twice?)"
    else:
        place = next(i for i, (a, b) in enumerate(zip(reported, mine)) if a != b)
        what = f"read token id {reported[place]} at place {place} where the trainer has {mine[place]}"
    raise UserError(
        f"study {prompt.study_id}: {where} {what}; its samples would answer another prompt than the one that is "
        "trained, so nothing was trained on them"
    )


def check_loaded(loaded: Mapping[str, Any], where: str) -> None:
    """Raises UserError where the weights that vLLM's model got are not its own, or leave some of its parameters out."""
    if refused := loaded.get("refused"):
        raise UserError(
            f"{where} does not take the policy's weights ({refused}); start it with the model that the run starts from"
        )
    if missing := loaded["missing"]:
        raise UserError(
            f"{where} has {len(missing)} parameters that the policy's weights do not fill, e.g. {missing[0]}; its "
            "samples would not be the policy's: use rollout.engine=hf for this model"
        )


def make_sample(policy: Policy, ids: Sequence[int], logps: Sequence[float]) -> Sample:
    """A sample from the tokens that vLLM returned, its end-of-turn token included where it came."""
    return Sample(tuple(ids), tuple(logps), policy.decode(ids), ids[-1] not in policy.stop_ids)
