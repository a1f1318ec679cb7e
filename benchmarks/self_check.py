"""What the first step's check can tell apart: packed against dense log-probs of a real language model, right and wrong.

    python benchmarks/self_check.py FOLDER      # a causal language model's folder, such as SmolLM2-135M-Instruct's

Prints the root mean square difference, in nats, by precision: of rounding, and of planted faults. The tolerances in
`unirg/grpo/choose.py` were set with it.
"""

import argparse
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from unirg.grpo import prefix_attention, shared_prefix
from unirg.grpo.forward import AnswerScores, answer_logps
from unirg.policy import EncodedPrompt, PolicyConfig, load_policy
from unirg.prompt import PromptConfig

PROMPT = (
    "Indication: cough and fever. Comparison: none. Technique: frontal view of the chest. Write the findings of the "
    "report, in full sentences. "
)
REPORTS = [
    "The lungs are clear. No pleural effusion or pneumothorax. The heart is normal in size.",
    "There is a small left pleural effusion with adjacent atelectasis. The cardiac silhouette is enlarged.",
    "No acute cardiopulmonary abnormality.",
    "Right lower lobe opacity, which may represent pneumonia in the appropriate clinical setting. No effusion.",
]
REPEATING = [" ".join([REPORTS[2]] * n) for n in (6, 7, 8, 9)]


def shifted(by: int) -> Any:
    right = shared_prefix._positions

    def wrong(prompt: EncodedPrompt, answers: Any) -> torch.Tensor:
        positions = right(prompt, answers).clone()
        positions[..., len(prompt) :] += by
        return positions

    return patch.object(shared_prefix, "_positions", wrong)


def leaking() -> Any:
    def causal(layout: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, _: Any) -> Any:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scale).transpose(1, 2)

    return patch.object(prefix_attention, "_sdpa", causal)


def hidden() -> Any:
    right = prefix_attention._answer_mask

    def short(layout: Any, i: int, longest: int, window: int | None) -> torch.Tensor:
        mask = right(layout, i, longest, window).clone()
        mask[:, layout.studies[i].prompt - 1] = False
        return mask

    return patch.object(prefix_attention, "_answer_mask", short)


FAULTS = {
    "rounding": ExitStack,
    "positions one too far": lambda: shifted(1),
    "positions one too near": lambda: shifted(-1),
    "the prompt's last token hidden": hidden,
    "reports see each other": leaking,
}


def apart(one: AnswerScores, other: AnswerScores) -> float:
    difference = (one.logps_BT - other.logps_BT)[one.mask_BT.bool()].float()
    return float(difference.square().mean().sqrt())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    torch.set_num_threads(1)
    policy = load_policy(PolicyConfig(model=parser.parse_args().folder), PromptConfig())
    chat = [{"role": "user", "content": PROMPT * 3}]
    ids_P = torch.tensor(policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    prompts = [EncodedPrompt(name, ids_P, None, None, {}) for name in ("a", "b")]
    if refusal := shared_prefix.prepare(policy):
        raise SystemExit(refusal)
    policy.model.eval()
    exact: dict[str, AnswerScores] = {}
    for precision in ("float32", "bfloat16 autocast", "bfloat16 weights"):
        if precision == "bfloat16 weights":
            policy.model.to(torch.bfloat16)
        for kind, reports in (("four reports", REPORTS), ("reports that repeat themselves", REPEATING)):
            own = [policy.tokenizer(report)["input_ids"] for report in reports]
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
                dense = answer_logps(policy, prompts, [own, own[::-1]])
                exact.setdefault(kind, dense)
                print(f"{precision}, {kind}: dense {apart(dense, exact[kind]):.1e} from float32")
                for fault, planted in FAULTS.items():
                    with planted():
                        packed = shared_prefix.packed_logps(policy, prompts, [own, own[::-1]])
                    print(f"  packed from dense, {fault}: {apart(packed, dense):.2g}")


if __name__ == "__main__":
    main()
