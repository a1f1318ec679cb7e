"""One study, one forward: the log-probs of a group's answers with its image encoded and its prompt read once.

A packed row holds, study after study, `[prompt | answer 1 | answer 2 | ...]`. An answer's tokens attend to the prompt
and to themselves, and their positions go on where the prompt's end, so that each answer is computed as if it stood
alone behind the prompt: log-probs and gradients equal those of the dense path (`unirg.grpo.forward.answer_logps`) to
rounding. An answer's first token is predicted at the prompt's last one, its last token predicts nothing and is not fed.
Only positions that predict reach the head of the model. Of G answers of R tokens to a prompt of P, the language model
sees P + G(R - 1) tokens instead of G(P + R).

Shapes: T tokens of the packed row, N predicted tokens of all answers, B answers, R tokens of the longest answer.
"""

from collections.abc import Sequence
from functools import partial

import torch

from unirg.grpo.forward import AnswerScores, Forward, film_stand_in
from unirg.grpo.loss import logps_and_entropy
from unirg.grpo.prefix_attention import NAME, Kernel, PackedLayout, PackedStudy, register
from unirg.policy import EncodedPrompt, Policy

# Families whose packed forward is tested against the dense one, by the model's type and that of its language model.
VISION_FAMILIES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "llava", "idefics3", "smolvlm"}
TEXT_FAMILIES = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
}
TWO_WAY_IMAGES = {"gemma3"}


def prepare(policy: Policy) -> str | None:
    """Sets the attention of the policy's language model to one that can share a prompt.

    Without a packed row that attention is SDPA, whatever `policy.attention` says: sampling and dense forwards go on.
    Returns None, or why this model cannot share; the model is then as it was.
    """
    config = policy.base.config
    text = config.get_text_config()
    family, language = config.model_type, text.model_type
    if family not in VISION_FAMILIES | TEXT_FAMILIES or language not in TEXT_FAMILIES:
        name = family if family == language else f"{family} (language model {language})"
        return f"shared-prefix forwards are not proven for models of type {name}"
    if getattr(text, "attention_dropout", 0):
        return f"the language model has attention dropout ({text.attention_dropout})"
    if getattr(text, "use_bidirectional_attention", None):
        return "the language model is not causal (use_bidirectional_attention)"
    if getattr(text, "output_router_logits", False):
        return "its loss on expert routing (output_router_logits) does not know packed rows"
    takes = policy.forward_takes
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in takes]
    if missing:
        return f"{type(policy.base).__name__}.forward takes no {' or '.join(missing)}"
    register()
    text._attn_implementation = NAME
    return None


def packed_forward(kernel: Kernel) -> Forward:
    """The packed forward with its measure of size: what `answer_logps` is to the dense path."""
    return Forward(f"shared prefix ({kernel})", partial(packed_logps, kernel=kernel), packed_tokens)


def packed_tokens(parts: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Tokens of the packed row that holds, for each part, a prompt of so many tokens and answers of such lengths."""
    return sum(prompt + sum(lengths) - len(lengths) for prompt, lengths in parts)


def packed_logps(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
    kernel: Kernel = "sdpa",
) -> AnswerScores:
    """Log-probs of `answers[i]`, the token ids of the answers to `prompts[i]`; rows follow in that order.

    What `answer_logps` gives, to rounding, from one forward over one packed row. `prepare` must have been called on the
    policy.
    """
    if extra := film_stand_in(policy, prompts):
        prompts, answers = [*prompts, *extra], [*answers, []]
    device = policy.device
    ids, positions, types, keep = [], [], [], []
    studies: list[PackedStudy] = []
    start = 0
    for prompt, group in zip(prompts, answers, strict=True):
        fed = [torch.as_tensor(answer[:-1], dtype=torch.long) for answer in group]
        studies.append(PackedStudy(start, len(prompt), tuple(len(x) for x in fed)))
        ids += [prompt.ids_P, *fed]
        positions.append(_positions(prompt, studies[-1].answers))
        types.append(torch.zeros(studies[-1].end - start, dtype=torch.long))
        if prompt.types_P is not None:
            types[-1][: len(prompt)] = prompt.types_P
        last, first = start + len(prompt) - 1, start + len(prompt)
        for x in fed:
            keep += [last, *range(first, first + len(x))]
            first += len(x)
        start = studies[-1].end
    types_T = torch.cat(types).to(device)
    blocks_T = _image_blocks(types_T) if policy.base.config.model_type in TWO_WAY_IMAGES else None
    takes_types = "token_type_ids" in policy.forward_takes
    out = (policy.engine or policy.model)(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, dim=-1).to(device),
        # Four dimensions say "ready-made" to transformers, which then makes no mask; the layout stands in for it.
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),
        **({"token_type_ids": types_T[None]} if takes_types else {}),
        **policy.image_inputs(prompts, range(len(prompts))),
        logits_to_keep=torch.tensor(keep, device=device),
        use_cache=False,
        prefix_layout=PackedLayout(tuple(studies), kernel, device, blocks_T),
    )
    flat = [answer for group in answers for answer in group]
    ids_N = torch.tensor([token for answer in flat for token in answer], device=device)
    logps_N, entropies_N = logps_and_entropy(out.logits[0], ids_N, temperature, policy.banned_ids)
    mask_BR = torch.zeros(len(flat), max(map(len, flat)), dtype=torch.long)
    for row, answer in enumerate(flat):
        mask_BR[row, : len(answer)] = 1
    mask_BR = mask_BR.to(device)
    where = mask_BR.nonzero(as_tuple=True)
    empty_BR = torch.zeros(mask_BR.shape, device=device, dtype=logps_N.dtype)
    return AnswerScores(empty_BR.index_put(where, logps_N), empty_BR.index_put(where, entropies_N.detach()), mask_BR)


def _positions(prompt: EncodedPrompt, answers: Sequence[int]) -> torch.Tensor:
    """Position ids of one study's part of the row: (3, 1, T) for mRoPE models, else (1, T)."""
    own = [prompt.next_position + torch.arange(n) for n in answers]
    if prompt.positions_3P is None:
        return torch.cat([torch.arange(len(prompt)), *own])[None]
    return torch.cat([prompt.positions_3P, *(x.expand(3, -1) for x in own)], dim=1)[:, None]


def _image_blocks(types_T: torch.Tensor) -> torch.Tensor | None:
    """The number of each image token's run, -1 for other tokens; None without image tokens."""
    image_T = types_T == 1
    starts_T = image_T & ~torch.nn.functional.pad(image_T, (1, 0))[:-1]
    return torch.where(image_T, starts_T.cumsum(0), -1) if bool(image_T.any()) else None
