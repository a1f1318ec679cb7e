"""The typed recipe: what a YAML file under recipes/ may say. Field docstrings are the reference page."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unirg.data import DataConfig
from unirg.distributed import DistributedConfig
from unirg.evaluation.evaluate import EvaluationConfig
from unirg.grpo.loss import LossConfig
from unirg.grpo.monitors import MonitorConfig
from unirg.policy import PolicyConfig
from unirg.prompt import PromptConfig
from unirg.rollout import RolloutConfig, SamplingConfig
from unirg.scoring.contract import RewardConfig
from unirg.section import Section


class OptimiserConfig(Section):
    """AdamW with a warm-up and a schedule over the stage's steps."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate goes on after the warm-up: flat, or down to 0 at the last step."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only (biases and norms are left alone)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""


class StageConfig(Section):
    """What stages of every kind share."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """The stage's name: its folder, and how other stages refer to it."""
    start: str | None = None
    """The stage whose final policy this one starts from; default the stage before it. `policy` is the policy as
    built."""
    steps: int = Field(gt=0)
    """Optimiser steps."""
    optimiser: OptimiserConfig
    """Learning rate and its schedule."""
    studies_per_step: int = Field(32, gt=0)
    """Studies in one optimiser step, over all ranks."""
    studies_per_forward: int | None = Field(None, gt=0)
    """Studies in one forward and backward of a rank (gradient accumulation by whole groups); default all at once."""
    evaluate_every: int | None = Field(None, gt=0)
    """Score greedy reports of `evaluate_studies` dev studies every so many steps; default never."""
    evaluate_studies: int = Field(200, gt=0)
    """How many dev studies these evaluations read."""
    keep: Literal["last", "best"] = "last"
    """The policy that the stage ends with: the last one, or the best by `evaluation.headline` on dev."""
    checkpoint_every: int = Field(50, gt=0)
    """Steps between checkpoints to resume from."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many of these are kept, the newest; where one is damaged, a run goes on from the one before it. What
    `keep: best` keeps stays apart."""
    sees: str = ""
    """In words, what this arm is allowed to learn from; printed beside its results."""
    data: DataConfig | None = None
    """The stage's own data: keys given here replace those of the recipe's `data`."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> "StageConfig":
        if self.keep == "best" and self.evaluate_every is None:
            raise ValueError(f"stage '{self.name}': keep: best needs evaluate_every, which measures what is best")
        return self


class VisionStage(StageConfig):
    """Trains the vision tower alone on finding labels: stands in for a pretrained tower where none can be had."""

    kind: Literal["vision"]
    """A stage that trains the vision tower on the studies' labels."""

    @model_validator(mode="after")
    def _writes_no_reports(self) -> "VisionStage":
        if self.evaluate_every is not None:
            raise ValueError(f"stage '{self.name}': a vision stage writes no reports, so evaluate_every has no meaning")
        return self


class SftStage(StageConfig):
    """Supervised fine-tuning on the studies' reports: mean negative log-likelihood over report tokens."""

    kind: Literal["sft"]
    """A stage of supervised fine-tuning."""


class KlConfig(Section):
    """The penalty for leaving a reference policy; its weight is `loss.kl`."""

    reference: str = "start"
    """The reference policy: `start`, the policy that this stage starts from, or the name of an earlier stage."""


class GrpoStage(StageConfig):
    """Group relative policy optimisation on rewards."""

    kind: Literal["grpo"]
    """A stage of GRPO."""
    rewards: list[RewardConfig] = Field(min_length=1)
    """The rewards and their weights."""
    group_size: int = Field(8, gt=1)
    """G, reports sampled per study."""
    train_on: int | None = Field(None, gt=1)
    """Backward on only so many reports of each group, those whose advantages spread widest; default all."""
    sampling: SamplingConfig = SamplingConfig()
    """How reports are sampled."""
    aggregation: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """Weighted sum of the rewards, then normalised in the group; or each reward normalised, then summed (GDPO)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the group's standard deviation, the batch's, or nothing."""
    loss: LossConfig = LossConfig()
    """Loss, clipping and KL weight."""
    kl: KlConfig = KlConfig()
    """The reference policy of the KL penalty."""
    shared_prefix: bool = True
    """Read each study's images and prompt once for all of its reports, in one packed forward; false reads them once
    per report. The same numbers to rounding (but for the dropout of adapters, which is drawn anew for each copy), in
    less time and memory. Models that cannot share go on without."""
    shared_prefix_kernel: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """Attention of the packed forward: torch's SDPA, FlexAttention or FlashAttention's variable-length form (both CUDA
    only). `auto` times those that can run at the first step and takes the fastest; on a CPU it is sdpa."""
    shared_prefix_mismatch: Literal["stop", "dense"] = "stop"
    """What happens where the first step's check finds packed and dense log-probs apart: the run stops, or goes on
    without sharing."""
    tokens_per_forward: int = Field(8192, gt=0)
    """How many tokens one forward may hold; it bounds memory. Several studies share a forward, a group too large for
    one is split; a prompt with one report is never split, and may be over."""
    iterations: int = Field(1, gt=0)
    """Optimiser steps on each batch of samples (mu); 1 is on-policy."""
    ahead: bool = False
    """Sample each batch while the one before it is trained, and so with the weights of one update earlier; the loss
    weighs for it (`loss.correction`). It wants a sampler beside the trainer: `rollout.vllm.mode: server`, or the
    Hugging Face engine, which then holds a copy of the policy."""
    mask_truncated: bool = False
    """Leave reports that hit the length limit out of the loss."""
    resample: int = Field(0, ge=0)
    """How many times studies whose groups have no variance are replaced by fresh studies, within a step."""
    monitors: MonitorConfig = MonitorConfig()
    """Signs that the policy games its rewards: when to warn, when to stop."""

    @property
    def rows(self) -> int:
        """Reports that are decoded at once: a group is never parted."""
        return max(self.sampling.rows_per_forward, self.group_size)

    @model_validator(mode="after")
    def _parts_fit(self) -> "GrpoStage":
        if self.train_on is not None and self.train_on > self.group_size:
            raise ValueError(f"stage '{self.name}': train_on {self.train_on} is more than group_size {self.group_size}")
        if self.ahead and self.loss.correction == "none":
            raise ValueError(
                f"stage '{self.name}': ahead samples with older weights; set loss.correction to weigh for it"
            )
        if self.ahead and self.resample:
            raise ValueError(
                f"stage '{self.name}': resample asks for more reports while ahead samples the next batch's"
            )
        if not any(reward.weight for reward in self.rewards):
            raise ValueError(f"stage '{self.name}': every reward has weight 0; give at least one a weight")
        watched = self.monitors.warn.agreement is not None or self.monitors.stop.agreement is not None
        if watched and all(reward.weight for reward in self.rewards):
            raise ValueError(f"stage '{self.name}': monitors.agreement needs a held-out metric, a reward of weight 0")
        if self.kl.reference != "start" and not self.loss.kl:
            raise ValueError(f"stage '{self.name}': kl.reference is set, and loss.kl is 0: there is no penalty")
        return self


Stage = Annotated[VisionStage | SftStage | GrpoStage, Field(discriminator="kind")]


class Recipe(Section):
    """A whole run: data, policy, stages in order, and how the result is judged."""

    name: str
    """The run's name."""
    output: str = "runs/${name}"
    """The run folder; started again on the same folder, the run goes on where it was."""
    seed: int = 0
    """Every random choice of the run follows from it."""
    data: DataConfig
    """Where the studies come from."""
    prompt: PromptConfig = PromptConfig()
    """How a study becomes a prompt."""
    policy: PolicyConfig
    """The policy: built here or loaded."""
    stages: list[Stage] = Field(min_length=1)
    """The stages, in order; each starts from the one before it unless it says otherwise."""
    rollout: RolloutConfig = RolloutConfig()
    """What samples the reports that grpo stages learn from."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured at the end, and against which stage."""
    distributed: DistributedConfig = DistributedConfig()
    """How several ranks share the work."""
    jobs: int = Field(1, gt=0)
    """How many stages that do not wait for each other run at once, each as its own process."""
    threads: int | None = Field(None, gt=0)
    """CPU threads per process; default torch's."""
    trackers: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = []
    """Where metrics go besides the run folder: numbers only, no texts or images."""

    @model_validator(mode="after")
    def _stages_refer_back(self) -> "Recipe":
        """Stage names are unique, and `start` and `kl.reference` name earlier stages."""
        earlier: list[str] = []
        for stage in self.stages:
            if stage.name in earlier or stage.name in ("policy", "start"):
                raise ValueError(f"stage name '{stage.name}' is taken: give each stage its own")
            wanted = [("start", stage.start)] if stage.start not in (None, "policy") else []
            if isinstance(stage, GrpoStage) and stage.kl.reference != "start":
                wanted.append(("kl.reference", stage.kl.reference))
            for key, name in wanted:
                if name not in earlier:
                    raise ValueError(
                        f"stage '{stage.name}': {key} names '{name}', which is no earlier stage ({earlier})"
                    )
            earlier.append(stage.name)
        if self.evaluation.baseline is not None and self.evaluation.baseline not in earlier:
            raise ValueError(f"evaluation.baseline names '{self.evaluation.baseline}', which is no stage ({earlier})")
        for stage in self.stages:
            if isinstance(stage, GrpoStage) and stage.ahead:
                if self.rollout.engine == "vllm" and self.rollout.vllm.mode == "colocate":
                    raise ValueError(
                        f"stage '{stage.name}': ahead samples while the policy is trained, and a colocated "
                        "vLLM takes turns with it; take rollout.vllm.mode: server"
                    )
                if self.rollout.engine == "hf" and self.distributed.strategy != "ddp":
                    raise ValueError(
                        f"stage '{stage.name}': ahead has the Hugging Face engine sample with a copy of the "
                        "policy, which is not sharded; take vLLM servers, or distributed.strategy: ddp"
                    )
        writing = [stage.name for stage in self.stages if not isinstance(stage, VisionStage)]
        for name in self.evaluation.stages or ():
            if name not in writing:
                raise ValueError(f"evaluation.stages names '{name}', which is no stage that writes reports ({writing})")
        return self

    @model_validator(mode="after")
    def _servers_serve_one_stage(self) -> "Recipe":
        served = self.rollout.engine == "vllm" and self.rollout.vllm.mode == "server"
        # Its samples, its evaluations, or the reports that it leaves.
        if served and self.jobs > 1 and sum(not isinstance(stage, VisionStage) for stage in self.stages) > 1:
            raise ValueError("rollout.vllm.servers have the weights of one stage at a time: set jobs to 1")
        return self

    def start_of(self, stage: StageConfig) -> str:
        """The name of the stage that this one starts from, or "policy"."""
        if stage.start is not None:
            return stage.start
        index = [s.name for s in self.stages].index(stage.name)
        return self.stages[index - 1].name if index else "policy"
