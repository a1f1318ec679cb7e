"""Attention over a packed row: each study's prompt once, followed by its answers, which see the prompt and themselves.

Registered with transformers under the name "shared_prefix". The layout of the row comes as a forward keyword, which
gradient checkpointing keeps for its recomputation; without one the function is transformers' own SDPA.

Three kernels give the same numbers to rounding: `sdpa` runs anywhere, `flex` is FlexAttention (CUDA; on a CPU it has no
backward), `flash` FlashAttention's variable-length form (CUDA, half precision, no two-way image blocks). Shapes: H
heads, D width of a head, T tokens of the packed row, P tokens of a prompt, A answers of a study, L tokens of the
longest of them, K keys.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
Kernel = Literal["sdpa", "flex", "flash"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class PackedStudy:
    """Where a study lies in the row: its prompt from `start`, then its answers end to end.

    `answers` are the tokens that each occupies (its last token is predicted and never fed, so one fewer than it has).
    """

    start: int
    prompt: int
    answers: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.answers)


@dataclass(frozen=True)
class PackedLayout:
    """The row's studies, end to end from 0, and the kernel that attends over it.

    `blocks_T`, where the model lets image tokens attend to each other both ways (Gemma 3), numbers each token's block;
    -1 is outside of any. Index tensors and masks are made when a kernel first asks for them, once per layout.
    """

    studies: tuple[PackedStudy, ...]
    kernel: Kernel
    device: torch.device
    blocks_T: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return self.studies[-1].end

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """`make()`, kept under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: PackedLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query (1, H, T, D), key and value (1, fewer H, T, D) in, (1, T, H, D) out.

    `sliding_window`: a token sees so many positions, itself among them, counted along its own study and answer.

    Raises ValueError for what the packed row cannot express (soft-capping, attention sinks, biases, dropout), and for
    a query that is not the layout's row.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    odd = [name for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if odd or dropout:
        raise ValueError(f"shared-prefix attention has no {', '.join(odd) or 'dropout'}; use shared_prefix: false")
    if query.shape[0] != 1 or query.shape[2] != prefix_layout.tokens:
        raise ValueError(
            f"a packed row of {prefix_layout.tokens} tokens met a query of shape {tuple(query.shape)} in "
            f"{type(module).__name__}; use shared_prefix: false"
        )
    attend = {"sdpa": _sdpa, "flex": _flex, "flash": _flash}[prefix_layout.kernel]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(prefix_layout, query, key, value, scaling, sliding_window), None


def register() -> None:
    """Makes the name known to transformers, with SDPA's masks for forwards without a layout."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _sdpa(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Study by study, see `_one_study`."""
    shared = query.shape[1] // key.shape[1]  # heads of the query that share a head of keys
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    studies = [_one_study(layout, i, query, key, value, scaling, window) for i in range(len(layout.studies))]
    return torch.cat(studies, dim=1).transpose(0, 1)[None]


def _one_study(
    layout: PackedLayout, i: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """(H, tokens of the study, D): the prompt as ordinary causal attention; its answers, in batches of like length,
    over the prompt's keys and their own."""
    study = layout.studies[i]
    prompt = slice(study.start, study.start + study.prompt)
    mask_PP = layout.once(("prompt", i, window), lambda: _prompt_mask(layout, i, window))
    out = scaled_dot_product_attention(
        query[:, :, prompt],
        key[:, :, prompt],
        value[:, :, prompt],
        attn_mask=mask_PP,
        is_causal=mask_PP is None,
        scale=scaling,
    )[0]
    if not any(study.answers):
        return out
    batches, back_N = layout.once(("answers", i), lambda: _batches(study, layout.device))
    heads, width = query.shape[1], query.shape[3]
    pieces = []
    for index_N, kept_N, longest in batches:

        def padded(x: Tensor, index_N: Tensor = index_N, longest: int = longest) -> Tensor:  # (A, H, L, D)
            return x[0].index_select(1, index_N).view(heads, -1, longest, width).transpose(0, 1)

        own_key, own_value = padded(key), padded(value)
        answers = len(own_key)
        attended = scaled_dot_product_attention(
            padded(query),
            torch.cat([key[:, :, prompt].expand(answers, -1, -1, -1), own_key], dim=2),
            torch.cat([value[:, :, prompt].expand(answers, -1, -1, -1), own_value], dim=2),
            attn_mask=layout.once(("mask", i, longest, window), partial(_answer_mask, layout, i, longest, window)),
            scale=scaling,
        )
        pieces.append(attended.transpose(0, 1).reshape(heads, -1, width).index_select(1, kept_N))
    own = pieces[0] if back_N is None else torch.cat(pieces, dim=1).index_select(1, back_N)
    return torch.cat([out, own], dim=1)


def _batches(study: PackedStudy, device: torch.device) -> tuple[list[tuple[Tensor, Tensor, int]], Tensor | None]:
    """The study's answers in batches, none more than twice as long as the shortest of its batch: padding to one very
    long answer would cost more than all of them. Per batch its row indices padded to its longest L, (A * L), which of
    those are no padding, and L; then what puts the batches' tokens in the row's order, None where they are."""
    starts = list(itertools.accumulate(study.answers, initial=study.start + study.prompt))
    by_length = sorted((n, starts[a]) for a, n in enumerate(study.answers) if n)
    batches: list[list[tuple[int, int]]] = []
    for n, start in by_length:
        if batches and n <= 2 * max(16, batches[-1][0][0]):
            batches[-1].append((n, start))
        else:
            batches.append([(n, start)])
    made, order = [], []
    for batch in batches:
        batch.sort(key=lambda answer: answer[1])
        longest = max(n for n, _ in batch)
        index = [start + min(j, n - 1) for n, start in batch for j in range(longest)]
        kept = [a * longest + j for a, (n, _) in enumerate(batch) for j in range(n)]
        order += [start + j for n, start in batch for j in range(n)]
        made.append((torch.tensor(index, device=device), torch.tensor(kept, device=device), longest))
    return made, None if len(made) == 1 else torch.tensor(order, device=device).argsort()


def _prompt_mask(layout: PackedLayout, i: int, window: int | None) -> Tensor | None:
    """(P, P), true where a prompt token sees another; None where that is plainly causal."""
    study = layout.studies[i]
    order = torch.arange(study.prompt, device=layout.device)
    blocks_P = None if layout.blocks_T is None else layout.blocks_T[study.start : study.start + study.prompt]
    if blocks_P is None and (window is None or window >= study.prompt):
        return None
    allowed = order[:, None] >= order
    if blocks_P is not None:
        allowed = allowed | ((blocks_P[:, None] == blocks_P) & (blocks_P >= 0))
    return allowed if window is None else allowed & (order[:, None] - order < window)


def _answer_mask(layout: PackedLayout, i: int, longest: int, window: int | None) -> Tensor:
    """(L, P + L), true where a token of an answer sees a token of the prompt or of its own answer."""
    prompt = layout.studies[i].prompt
    order = torch.arange(prompt + longest, device=layout.device)
    allowed = order[prompt:, None] >= order
    return allowed if window is None else allowed & (order[prompt:, None] - order < window)


def _flash(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """One call: every prompt and every answer is a sequence of its own, an answer's keys begin with its prompt's.
    Causal attention of unequal lengths is aligned at the end, which is what an answer needs."""
    from torch.nn.attention.varlen import varlen_attn

    if layout.blocks_T is not None:
        raise ValueError("the flash kernel has no two-way image blocks; use shared_prefix_kernel: sdpa or flex")
    queries_S, keys_S, index_K, longest_query, longest_key = layout.once("flash", lambda: _sequences(layout))
    dtype = value.dtype  # rotary embeddings may have left query and key in float32 under autocast
    query, key, value = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    if shared > 1 and not grouped:  # torch 2.11 has no such flag
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    out = varlen_attn(
        query.contiguous(),
        key.index_select(0, index_K),
        value.index_select(0, index_K),
        queries_S,
        keys_S,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _sequences(layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Cumulative lengths of queries and of keys, the row index of each key, and the longest of both."""
    queries: list[int] = []
    keys: list[list[int]] = []
    for study in layout.studies:
        prompt = list(range(study.start, study.start + study.prompt))
        queries.append(study.prompt)
        keys.append(prompt)
        first = study.start + study.prompt
        for n in study.answers:
            if n:
                queries.append(n)
                keys.append(prompt + list(range(first, first + n)))
                first += n

    def cumulative(lengths: Sequence[int]) -> Tensor:
        total = torch.tensor([0, *lengths]).cumsum(0)
        return total.to(dtype=torch.int32, device=layout.device)

    lengths = [len(own) for own in keys]
    index_K = torch.tensor([k for own in keys for k in own], device=layout.device)
    return cumulative(queries), cumulative(lengths), index_K, max(queries), max(lengths)


def _flex(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """The whole row at once under a block mask."""
    mask = layout.once(("flex", window), lambda: _block_mask(layout, window))
    attend = _flex_attention(query.is_cuda)
    dtype = value.dtype  # as in _flash
    out = attend(
        query.to(dtype),
        key.to(dtype),
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    """Compiled for dynamic shapes: a static one would compile anew, for seconds, at every length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _block_mask(layout: PackedLayout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    study: list[int] = []
    answer: list[int] = []
    order: list[int] = []
    for i, packed in enumerate(layout.studies):
        for a, n in enumerate((packed.prompt, *packed.answers)):  # 0 is the prompt, the answers count from 1
            study += [i] * n
            answer += [a] * n
            order += range(n) if a == 0 else range(packed.prompt, packed.prompt + n)
    study_T, answer_T, order_T = (torch.tensor(x, device=layout.device) for x in (study, answer, order))
    # Always tensors: a mask that branched on None would be compiled anew for each kind of layer and of row.
    blocks_T = torch.full_like(study_T, -1) if layout.blocks_T is None else layout.blocks_T
    reach = torch.tensor(layout.tokens if window is None else window, device=layout.device)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = (study_T[q] == study_T[k]) & ((answer_T[k] == 0) | (answer_T[k] == answer_T[q]))
        allowed = (order_T[q] >= order_T[k]) | ((blocks_T[q] == blocks_T[k]) & (blocks_T[k] >= 0))
        return mine & allowed & (order_T[q] - order_T[k] < reach)

    return create_block_mask(seen, None, None, layout.tokens, layout.tokens, device=str(layout.device))
