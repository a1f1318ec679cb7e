"""Which forward a run uses: packed where the model allows it, with the fastest kernel, after a check against the dense
one on a real group of the run's first step.

The check compares log-probs, which a wrong position, mask or image would move, in the precision of the run.
"""

import time
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import broadcast_object_list

from unirg import run as run_folder
from unirg.errors import UserError
from unirg.grpo.forward import DENSE, Forward, plan_forwards
from unirg.grpo.prefix_attention import Kernel, PackedLayout, PackedStudy, shared_prefix_attention
from unirg.grpo.shared_prefix import TWO_WAY_IMAGES, prepare, shared_prefix
from unirg.policy import EncodedPrompt, Policy
from unirg.recipe.schema import GrpoStage
from unirg.training import StageRun, say

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.12}
"""The largest root mean square difference of log-probs, in nats, by precision.

On SmolLM2-135M (CPU, four reports) rounding gave 5e-6 in float32 and .045 to .062 in bfloat16, where the dense path was
itself .048 away from float32. Positions off by one gave .29 to .56, a hidden prompt token .78, a mask that leaks
between answers 2.2, in either precision.
"""

Answers = Sequence[Sequence[Sequence[int]]]


def choose_forward(
    work: StageRun, reference: Policy | None, prompts: Sequence[EncodedPrompt], answers: Answers
) -> Forward:
    """The stage's forward, told in one line and written to the manifest; `prompts` and `answers` are of its first step.

    Raises UserError with the numbers where packed and dense log-probs differ and `shared_prefix_mismatch` is `stop`,
    and for a kernel that cannot run here.
    """
    stage: GrpoStage = work.stage
    forward, line = DENSE, "prompts are read once per report (shared_prefix: false)"
    if stage.shared_prefix:
        reason = prepare(work.policy) or (None if reference is None else prepare(reference))
        if reason is not None:
            line = f"prompts are read once per report: {reason}"
        else:
            kernel = _kernel(work, prompts, answers)
            forward, line = _checked(work, shared_prefix(kernel), prompts, answers)
    say(work.accelerator, stage.name, line)
    if work.accelerator.is_main_process:
        run_folder.update_manifest(work.run, forwards={stage.name: line})
    return forward


def _checked(
    work: StageRun, forward: Forward, prompts: Sequence[EncodedPrompt], answers: Answers
) -> tuple[Forward, str]:
    stage: GrpoStage = work.stage
    with work.accelerator.autocast():
        difference, study = self_check(
            work.policy, forward, prompts, answers, stage.tokens_per_forward, stage.sampling.temperature
        )
    everyones = work.accelerator.gather(torch.tensor([difference], device=work.accelerator.device))
    dtype = work.policy.config.dtype
    worst, allowed = float(everyones.nan_to_num(nan=torch.inf).max()), TOLERANCE[dtype]
    found = f"packed and dense log-probs differ by {worst:.1e} (root mean square, nats; {dtype}, allowed {allowed:g})"
    if worst <= allowed:
        return forward, f"{forward.name}: {found}"
    if stage.shared_prefix_mismatch == "dense":
        return DENSE, f"prompts are read once per report: {found}"
    where = f" on study {study}" if difference == worst else " on another rank"
    raise UserError(
        f"stage {stage.name}: {found}{where}. The packed forward is not exact for this model; nothing was trained with "
        f"it. Set stages.{stage.name}.shared_prefix=false, or shared_prefix_mismatch=dense to fall back by itself"
    )


@torch.no_grad()
def self_check(
    policy: Policy,
    forward: Forward,
    prompts: Sequence[EncodedPrompt],
    answers: Answers,
    budget: int,
    temperature: float = 1.0,
) -> tuple[float, str]:
    """Root mean square difference, in nats, between `forward` and the dense path on the group with most answers, which
    shares its packed row with the next group where both fit the budget; and the first study's id.

    Each path makes one forward: the dense one on the row's last answers, as many as the budget holds. The model is in
    evaluation mode meanwhile; no random number is drawn.
    """
    g = max(range(len(answers)), key=lambda i: len(answers[i]))
    pair = sorted({g, (g + 1) % len(answers)})
    lengths = [list(map(len, answers[i])) for i in pair]
    plan = plan_forwards(forward, [len(prompts[i]) for i in pair], lengths, budget=budget)
    parts = max(plan, key=lambda parts: sum(len(part.answers) for part in parts))
    chosen = [prompts[pair[part.group]] for part in parts]
    group = [[answers[pair[part.group]][a] for a in part.answers] for part in parts]
    rows = [(prompt, answer) for prompt, own in zip(chosen, group, strict=True) for answer in own]
    last = rows
    while len(last) > 1 and DENSE.tokens([(len(prompt), [len(answer)]) for prompt, answer in last]) > budget:
        last = last[1:]
    training = policy.model.training
    policy.model.eval()
    try:
        packed = forward.logps(policy, chosen, group, temperature=temperature)
        dense = DENSE.logps(
            policy, [prompt for prompt, _ in last], [[answer] for _, answer in last], temperature=temperature
        )
    finally:
        policy.model.train(training)
    mask_BT = dense.mask_BT.bool()
    packed_BT = packed.logps_BT[len(rows) - len(last) :, : mask_BT.shape[1]]
    difference = (packed_BT - dense.logps_BT)[mask_BT]
    return float(difference.square().mean().sqrt()), chosen[0].study_id


def _kernel(work: StageRun, prompts: Sequence[EncodedPrompt], answers: Answers) -> Kernel:
    """The recipe's kernel, or the fastest of those that can run here: the main process measures and tells the rest."""
    wanted, policy, key = work.stage.shared_prefix_kernel, work.policy, f"stages.{work.stage.name}.shared_prefix_kernel"
    cuda = policy.device.type == "cuda"
    half = policy.config.dtype == "bfloat16"
    two_way = policy.base.config.model_type in TWO_WAY_IMAGES
    if wanted in ("flex", "flash") and not cuda:
        raise UserError(f"{key}: {wanted} needs a CUDA device, and the policy is on {policy.device}; take auto or sdpa")
    if wanted == "flash" and (two_way or not half):
        why = "has image tokens that attend both ways" if two_way else "runs in float32 (policy.dtype)"
        raise UserError(f"{key}: flash cannot be used: the policy {why}; take auto, flex or sdpa")
    if wanted != "auto":
        return wanted
    if not cuda:
        return "sdpa"
    kernels: list[Kernel] = ["sdpa", "flex", "flash"] if half and not two_way else ["sdpa", "flex"]
    chosen: list[Kernel] = ["sdpa"]
    if work.accelerator.is_main_process:
        row = tuple(_row(prompts, answers, work.stage.tokens_per_forward))
        chosen = [fastest_kernel(policy, row, kernels, lambda text: say(work.accelerator, work.stage.name, text))]
    broadcast_object_list(chosen)
    return chosen[0]


def _row(prompts: Sequence[EncodedPrompt], answers: Answers, budget: int) -> list[PackedStudy]:
    """A packed row as the first forward of the step will have it."""
    lengths = [list(map(len, own)) for own in answers]
    sizes = list(map(len, prompts))
    plan = plan_forwards(shared_prefix("sdpa"), sizes, lengths, budget=budget)
    row: list[PackedStudy] = []
    for part in plan[0]:
        own = tuple(lengths[part.group][a] - 1 for a in part.answers)
        row.append(PackedStudy(row[-1].end if row else 0, sizes[part.group], own))
    return row


def fastest_kernel(
    policy: Policy, row: tuple[PackedStudy, ...], kernels: Sequence[Kernel], tell: Callable[[str], None]
) -> Kernel:
    """Times attention alone, forward and backward, on random queries of the language model's shape over `row`.

    A kernel that cannot run here (no Triton, a head too wide) is named by `tell` and left out.
    """
    text, device = policy.base.config.get_text_config(), policy.device
    heads, keys = text.num_attention_heads, text.num_key_value_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    dtype = torch.bfloat16 if policy.config.dtype == "bfloat16" else torch.float32
    tokens = row[-1].end
    query = torch.randn(1, heads, tokens, width, device=device, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, keys, tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in "kv")
    seconds: dict[Kernel, float] = {}
    for kernel in kernels:
        layout = PackedLayout(row, kernel, device)
        try:
            for attempt in range(6):
                if attempt == 3:  # the first ones compile
                    _wait(device)
                    started = time.perf_counter()
                out, _ = shared_prefix_attention(policy.model, query, key, value, None, prefix_layout=layout)
                out.sum().backward()
            _wait(device)
            seconds[kernel] = time.perf_counter() - started
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            tell(f"kernel {kernel} cannot run here: {str(error).splitlines()[0]}")
    return min(seconds, key=lambda kernel: seconds[kernel])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
