"""One GRPO update of one group by three ways, on the same rows with the same weights: packed, dense, and TRL 1.16's.

The loss of all three is the advantages times the answers' mean log-probs. TRL's way is `GRPOTrainer`'s own
`_get_per_token_logps_and_entropies`, called as the trainer calls it: once without gradient (the old log-probs, which it
needs to correct for its sampler) and once with. Ours take the old log-probs from the forward that trains.

Shapes: G answers, P tokens of the prompt, T of a row or of the longest answer.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from unirg.grpo.forward import answer_logps
from unirg.grpo.prefix_attention import Kernel
from unirg.grpo.shared_prefix import packed_logps, prepare
from unirg.policy import EncodedPrompt, Policy, PolicyConfig
from unirg.prompt import PromptConfig
from unirg.tiny import TinyConfig

IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = 3, 4, 5, 6, 10

# Language model: width, MLP, layers, heads, key-value heads, width of a head, vocabulary. Vision tower: width, MLP,
# layers, heads, layers whose features go deeper. `scaled` has about the 2B model's proportions: work of the tower, of
# the language model and of the head on a prompt. In `sketch` the tower is several times too heavy.
POLICIES = {
    "sketch": ((256, 768, 4, 4, 2, 64, 4000), (256, 768, 4, 4, [1, 2])),
    "scaled": ((384, 1152, 6, 6, 3, 64, 7000), (128, 512, 5, 2, [1, 2, 3])),
    "qwen3-vl-2b": ((2048, 6144, 28, 16, 8, 128, 151936), (1024, 4096, 24, 16, [5, 11, 17])),
    "qwen3-vl-4b": ((2560, 9728, 36, 32, 8, 128, 151936), (1024, 4096, 24, 16, [5, 11, 17])),
}
MROPE = {64: [12, 10, 10], 128: [24, 20, 20]}  # by width of a head, as Qwen3-VL divides it


@dataclass(frozen=True)
class Setting:
    """A group: `films` films of `side` x `side` image tokens (32 pixels each way), text that fills the prompt up to
    `prompt` tokens, `group` answers of `shortest` to `longest` tokens."""

    prompt: int
    films: int
    side: int
    group: int
    shortest: int = 60
    longest: int = 120


@dataclass(frozen=True)
class Rows:
    """One group: its prompt, its G answers' token ids and their advantages."""

    prompt: EncodedPrompt
    answers: list[list[int]]
    advantages_G: torch.Tensor


@dataclass(frozen=True)
class Side:
    """One way to do the update: the log-probs (G, longest answer), 0 past an answer's end, under `model`."""

    model: Any
    logps: Callable[[], torch.Tensor]
    old_pass: bool = False
    """Forwards once more, without gradient, before the forward that trains."""


Build = Callable[[Rows, Kernel], dict[str, Side]]
"""Makes the three sides, `packed`, `dense` and `trl`, for a group; the kernel is the packed one's."""


def build_policy(name: str, device: str) -> Policy:
    """A random Qwen3-VL without processor: prompts are made here. bf16 on a GPU, else float32.

    Weights are drawn wide enough that log-probs hang on positions, masks and films, as those of a trained model do.
    """
    (width, mlp, layers, heads, kv_heads, head, vocabulary), (tower, tower_mlp, depth, tower_heads, deep) = POLICIES[
        name
    ]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": MROPE[head],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "initializer_range": width**-0.5,
        },
        vision_config={
            "depth": depth,
            "hidden_size": tower,
            "intermediate_size": tower_mlp,
            "num_heads": tower_heads,
            "out_hidden_size": width,
            "deepstack_visual_indexes": deep,
            "initializer_range": tower**-0.5,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    settings = PolicyConfig(tiny=TinyConfig(), dtype="bfloat16" if device == "cuda" else "float32")
    dtype = getattr(torch, settings.dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    # Nothing is banned: TRL bans no placeholders, and the sides are to give the same numbers.
    return Policy(model, None, PromptConfig(), settings, 1, (1,), 0, ())


def draw(setting: Setting, policy: Policy, seed: int = 0) -> Rows:
    """A group of random words and films, the same for the same seed."""
    config, rng = policy.model.config, torch.Generator().manual_seed(seed)

    def words(n: int) -> torch.Tensor:
        return torch.randint(FIRST_WORD, config.text_config.vocab_size, (n,), generator=rng)

    film = torch.tensor([VISION_START] + [IMAGE] * setting.side**2 + [VISION_END])
    text = setting.prompt - setting.films * len(film)
    ids_P = torch.cat([words(8), film.repeat(setting.films), words(text - 8)])
    types_P = (ids_P == IMAGE).long()
    merge, vision = config.vision_config.spatial_merge_size, config.vision_config
    grid = torch.tensor([[1, setting.side * merge, setting.side * merge]]).repeat(setting.films, 1)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), values, generator=rng).to(policy.model.dtype)
    positions_3BP, _ = policy.model.model.get_rope_index(
        ids_P[None], mm_token_type_ids=types_P[None], image_grid_thw=grid
    )
    images = {"pixel_values": pixels, "image_grid_thw": grid}
    lengths = torch.randint(setting.shortest, setting.longest + 1, (setting.group,), generator=rng).tolist()
    return Rows(
        EncodedPrompt("drawn", ids_P, positions_3BP[:, 0], types_P, images),
        [words(n).tolist() for n in lengths],
        torch.randn(setting.group, generator=rng).to(policy.device),
    )


def build_sides(name: str, device: str) -> tuple[Build, Policy]:
    """What makes the sides of a group, and the packed side's policy. Each side has a model of its own: TRL
    replaces the forward of its model, the packed side the attention."""
    packed = build_policy(name, device)
    dense, trl = (replace(packed, model=copy.deepcopy(packed.model)) for _ in range(2))
    refusal = prepare(packed)
    if refusal:
        raise SystemExit(refusal)
    add_fused_lm_head(trl.model, temperature=1.0, outputs=("log_probs", "entropy"))  # as GRPOTrainer.__init__ does

    def sides(rows: Rows, kernel: Kernel) -> dict[str, Side]:
        group = ([rows.prompt], [rows.answers])
        return {
            "packed": Side(packed.model, lambda: packed_logps(packed, *group, kernel=kernel).logps_BT),
            "dense": Side(dense.model, lambda: answer_logps(dense, *group).logps_BT),
            "trl": Side(trl.model, trl_logps(trl.model, rows), old_pass=True),
        }

    return sides, packed


def trl_logps(model: Any, rows: Rows) -> Callable[[], torch.Tensor]:
    """TRL's own method on what its trainer makes of the group: every row with its prompt and its films."""
    group, prompt = len(rows.answers), len(rows.prompt)
    longest = max(len(answer) for answer in rows.answers)
    ids_GT = torch.zeros(group, prompt + longest, dtype=torch.long)
    mask_GT = torch.zeros_like(ids_GT)
    for row, answer in enumerate(rows.answers):
        ids_GT[row, : prompt + len(answer)] = torch.cat([rows.prompt.ids_P, torch.tensor(answer)])
        mask_GT[row, : prompt + len(answer)] = 1
    films = len(rows.prompt.images["image_grid_thw"])
    inputs = {name: tensor.repeat(group, 1) for name, tensor in rows.prompt.images.items()}
    inputs["mm_token_type_ids"] = (ids_GT == IMAGE).long()
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    ids_GT, mask_GT = ids_GT.to(model.device), mask_GT.to(model.device)
    trainer = SimpleNamespace(  # all that the method asks of its trainer
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext, is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
    )

    def logps() -> torch.Tensor:
        return GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            model,
            ids_GT,
            mask_GT,
            longest,
            batch_size=group,
            compute_entropy=torch.is_grad_enabled(),  # the loss asks for it, the old log-probs do not
            num_images=[films] * group,
            **inputs,
        )[0]

    return logps


def update(side: Side, rows: Rows, watch: Callable[[str], Any] = contextlib.nullcontext) -> torch.Tensor:
    """Forward and backward; gradients are left on the model. Returns the log-probs of the forward that trains."""
    side.model.zero_grad(set_to_none=True)
    if side.old_pass:
        with watch("old log-probs"), torch.no_grad():
            side.logps()
    with watch("log-probs and loss"):
        logps_GT = side.logps()
        lengths_G = torch.tensor([len(answer) for answer in rows.answers], device=logps_GT.device)
        loss = (rows.advantages_G * logps_GT.sum(dim=1) / lengths_G).sum()
    with watch("backward"):
        loss.backward()
    return logps_GT.detach()
