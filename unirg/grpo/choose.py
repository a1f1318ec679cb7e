"""Which forward a run uses: packed where the model allows it, with the fastest kernel, after a check against the dense
one on real groups of the first step.

The check compares log-probs, which a wrong position, mask or image would move. It runs in the precision of the weights,
without autocast: float32 wherever the weights are. The flash kernel, adapters on bfloat16 weights, and sharded weights
that are gathered in bfloat16 leave bfloat16.
"""

import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from accelerate.utils import broadcast_object_list
from rich.markup import escape

from unirg import run as run_folder
from unirg.distributed import is_sharded
from unirg.errors import UserError
from unirg.grpo.forward import DENSE, Forward, plan_forwards
from unirg.grpo.prefix_attention import Kernel, PackedLayout, PackedStudy, shared_prefix_attention
from unirg.grpo.shared_prefix import TWO_WAY_IMAGES, packed_forward, prepare
from unirg.policy import EncodedPrompt, Policy, PolicyConfig
from unirg.recipe.schema import GrpoStage
from unirg.training import StageRun, say

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.12}
"""The largest root mean square difference of log-probs, in nats at temperature 1, by precision.

On SmolLM2-135M (`benchmarks/self_check.py`, CPU) rounding gave 5e-6 in float32 and up to .061 in bfloat16, where the
dense path was itself .049 away from float32. Positions off by one gave .29 to .56 (on texts that repeat themselves as
little as .12), a hidden prompt token .59 to .79, a mask that leaks between answers 2.1 to 2.3, in either precision. So
float32 shows any fault, and bfloat16 the plain ones in a trained model; a random one moves too little.
"""

Answers = Sequence[Sequence[Sequence[int]]]


def share_prompts(work: StageRun, reference: Policy | None) -> str | None:
    """Prepares the stage's policies for packed forwards; to be called before anything is sampled, since it sets the
    attention of the language model. Returns None, or why prompts are not shared."""
    if not work.stage.shared_prefix:
        return "shared_prefix: false"
    return prepare(work.policy) or (None if reference is None else prepare(reference))


def choose_forward(work: StageRun, refusal: str | None, prompts: Sequence[EncodedPrompt], answers: Answers) -> Forward:
    """The stage's forward, told in one line and written to the manifest; `prompts` and `answers` are of its first step,
    `refusal` is what `share_prompts` said.

    Raises UserError with the numbers where packed and dense log-probs differ and `shared_prefix_mismatch` is `stop`,
    and for a kernel that cannot run here.
    """
    stage: GrpoStage = work.stage
    forward, line, kernel = DENSE, f"prompts are read once per report ({refusal})", None
    if refusal is None:
        kernel = _kernel(work, prompts, answers)
        forward, line = _checked(work, packed_forward(kernel), kernel, prompts, answers)
    say(work.accelerator, stage.name, escape(line))
    if work.accelerator.is_main_process:
        run_folder.update_manifest(work.run, forwards={stage.name: {"found": line, "kernel": kernel}})
    return forward


def _checked(
    work: StageRun, forward: Forward, kernel: Kernel, prompts: Sequence[EncodedPrompt], answers: Answers
) -> tuple[Forward, str]:
    stage, policy = work.stage, work.policy
    gathered = policy.config.dtype == "bfloat16" and is_sharded(policy.model)
    half = kernel == "flash" or gathered or policy.base.get_input_embeddings().weight.dtype != torch.float32
    dtype = "bfloat16" if half else "float32"
    with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=half):
        difference, studies = self_check(policy, forward, prompts, answers, stage.tokens_per_forward)
    everyones = work.accelerator.gather(torch.tensor([difference], device=work.accelerator.device))
    worst, allowed = float(everyones.nan_to_num(nan=torch.inf).max()), TOLERANCE[dtype]
    found = f"packed and dense log-probs differ by {worst:.1e} (root mean square, nats; {dtype}, allowed {allowed:g})"
    if worst <= allowed:
        return forward, f"{forward.name}: {found}"
    if stage.shared_prefix_mismatch == "dense":
        return DENSE, f"prompts are read once per report ({found})"
    where = "another rank" if difference <= allowed else f"studies {', '.join(studies)}"
    raise UserError(
        f"stage {stage.name}: {found}, on {where}. The packed forward is not exact for this model; nothing was trained "
        f"with it. Set stages.{stage.name}.shared_prefix=false, or shared_prefix_mismatch=dense to fall back by itself"
    )


@torch.no_grad()
def self_check(
    policy: Policy, forward: Forward, prompts: Sequence[EncodedPrompt], answers: Answers, budget: int
) -> tuple[float, list[str]]:
    """Root mean square difference, in nats, between `forward` and the dense path on the group with most tokens, which
    shares its packed row with the next group where both fit the budget; and the ids of the studies in it.

    Each path makes one forward: the dense one on the row's last answers, as many as the budget holds, at temperature 1.
    The model is in evaluation mode meanwhile; no random number is drawn.
    """
    g = max(range(len(answers)), key=lambda i: sum(map(len, answers[i])))
    pair = sorted({g, (g + 1) % len(answers)})
    lengths = [list(map(len, answers[i])) for i in pair]
    plan = plan_forwards(forward, [len(prompts[i]) for i in pair], lengths, budget=budget)
    parts = max(plan, key=lambda parts: sum(len(part.answers) for part in parts))
    chosen = [prompts[pair[part.group]] for part in parts]
    rows = [[answers[pair[part.group]][a] for a in part.answers] for part in parts]
    last, last_prompts = [list(own) for own in rows], list(chosen)
    while sum(map(len, last)) > 1 and _dense_tokens(last_prompts, last) > budget:
        del last[0][0]
        if not last[0]:
            del last[0], last_prompts[0]
    training = policy.model.training
    policy.model.eval()
    try:
        packed = forward.logps(policy, chosen, rows)
        dense = DENSE.logps(policy, last_prompts, last)
    finally:
        policy.model.train(training)
    mask_BT = dense.mask_BT.bool()
    packed_BT = packed.logps_BT[-len(mask_BT) :, : mask_BT.shape[1]]
    difference = (packed_BT - dense.logps_BT)[mask_BT]
    return float(difference.square().mean().sqrt()), [prompt.study_id for prompt in chosen]


def _dense_tokens(prompts: Sequence[EncodedPrompt], answers: Answers) -> int:
    return DENSE.tokens([(len(prompt), list(map(len, own))) for prompt, own in zip(prompts, answers, strict=True)])


def _kernel(work: StageRun, prompts: Sequence[EncodedPrompt], answers: Answers) -> Kernel:
    """The recipe's kernel, or the fastest of those that can run here: the main process measures and tells the rest, and
    a run that goes on keeps its kernel."""
    wanted, policy = work.stage.shared_prefix_kernel, work.policy
    cuda = policy.device.type == "cuda"
    check_kernel(work.stage, policy.config, cuda)
    half = policy.config.dtype == "bfloat16"
    two_way = policy.base.config.model_type in TWO_WAY_IMAGES
    if wanted == "flash" and two_way:
        raise UserError(
            f"stages.{work.stage.name}.shared_prefix_kernel: flash cannot be used: the policy's image tokens attend "
            "both ways; take auto, flex or sdpa"
        )
    if wanted != "auto":
        return wanted
    if not cuda:
        return "sdpa"
    kernels: list[Kernel] = ["sdpa", "flex", "flash"] if half and not two_way else ["sdpa", "flex"]
    chosen: list[Kernel] = ["sdpa"]
    if work.accelerator.is_main_process:
        row = tuple(_row(prompts, answers, work.stage.tokens_per_forward))
        kept = _kept_kernel(work)

        def tell(text: str) -> None:
            say(work.accelerator, work.stage.name, escape(text))

        chosen = [kept if kept in kernels else fastest_kernel(policy, row, kernels, tell)]
    broadcast_object_list(chosen)
    return chosen[0]


def check_kernel(stage: GrpoStage, policy: PolicyConfig, cuda: bool) -> None:
    """Raises UserError where the recipe names a kernel that cannot run: known before anything is trained."""
    wanted, key = stage.shared_prefix_kernel, f"stages.{stage.name}.shared_prefix_kernel"
    if wanted in ("flex", "flash") and not cuda:
        raise UserError(f"{key}: {wanted} needs a CUDA device, and there is none; take auto or sdpa")
    if wanted == "flash" and policy.dtype == "float32":
        raise UserError(f"{key}: flash works in half precision, and policy.dtype is float32; take auto, flex or sdpa")


def _kept_kernel(work: StageRun) -> Kernel | None:
    return cast(
        Kernel | None, run_folder.read_manifest(work.run).get("forwards", {}).get(work.stage.name, {}).get("kernel")
    )


def _row(prompts: Sequence[EncodedPrompt], answers: Answers, budget: int) -> list[PackedStudy]:
    """A packed row as the first forward of the step will have it."""
    lengths = [list(map(len, own)) for own in answers]
    sizes = list(map(len, prompts))
    plan = plan_forwards(packed_forward("sdpa"), sizes, lengths, budget=budget)
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
    own = torch.Generator(device).manual_seed(0)  # training's generator must not move
    query, key, value = (
        torch.randn(1, n, tokens, width, generator=own, device=device, dtype=dtype, requires_grad=True)
        for n in (heads, keys, keys)
    )
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
            said = (str(error) or type(error).__name__).splitlines()[0]
            tell(f"kernel {kernel} cannot run here: {said}")
    return min(seconds, key=lambda kernel: seconds[kernel])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
