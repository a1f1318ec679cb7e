"""A recipe's stages, in order or side by side; then the evaluation and the report.

    unirg train recipes/x.yaml a.b=c
    torchrun --nproc-per-node 2 -m unirg train recipes/x.yaml

Each stage starts from another stage's final policy, so the stages are a tree; those that do not wait for each other may
run at once (`jobs`). Started again on the same folder, the run goes on where it was.
"""

import gc
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from unirg import checkpoint, ranks, signals, watchdog, zero3
from unirg import run as run_folder
from unirg.check import check, check_settings, check_shares, read_films
from unirg.data import fingerprint, load_studies
from unirg.distributed import beside_engine, distribute, filled, outline
from unirg.errors import UserError, tell
from unirg.evaluation.dev import dev_evaluation, dev_studies
from unirg.evaluation.run import max_new_tokens, report_writer, stage_predictions
from unirg.policy import Policy, blank_prompt, load_policy, vision_tower
from unirg.process import end, hold, joined, see
from unirg.prompt import build_messages, prompt_images, report_text
from unirg.recipe.load import dump_recipe, load_recipe
from unirg.recipe.schema import GrpoStage, Recipe, SftStage, StageConfig, VisionStage
from unirg.rollout import Sampler, SamplingConfig, open_sampler
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import check_trainable
from unirg.study import Study
from unirg.training import StageRun, console, in_words, together

INITIAL = "policy"
THREADS = torch.get_num_threads()
"""Torch's own number, taken once: stages that run one after another in this process do not divide it again."""
# New names for what peft, and the oldest transformers that we take, know by the old ones.
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)


def train(recipe: Path, overrides: Sequence[str] = ()) -> int:
    """Runs a recipe file to its report. Bad recipes and bad data are UserErrors before any training time is spent.

    Raises signals.Stopped where a signal asked the run to stop, and UserError where another process has the folder, or
    a disk takes no more.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.end_with_parent()
    ranks.check_restarts()
    resolved = load_recipe(recipe, overrides)
    run = Path(resolved.output)
    with signals.handled(), in_words(str(run)), ExitStack() as held:
        with joined(resolved.distributed.timeout):
            first = ranks.rank() == 0
            _train(resolved, run, held)
        if first:  # the others have ended: what is left is one process's work
            with signals.going_on("with the evaluation"):
                finish(resolved, run)
    return 0


def _train(resolved: Recipe, run: Path, held: ExitStack) -> None:
    """The stages that are not finished, on all ranks."""
    main = ranks.rank() == 0
    # As the first rank sees it: a network file system may show others what was there a while ago.
    waiting = ranks.everyones([s.name for s in resolved.stages if not run_folder.final_folder(run, s.name).exists()])[0]
    with signals.going_on("from the last checkpoint" if run.exists() else "from its start"):
        # A recipe that is put right after this must find no folder of its broken self.
        with together("the check of the recipe", str(run)):
            if resolved.distributed.strategy == "zero3" and ranks.world() > 1:
                zero3.require()
            if main and run.exists():
                held.enter_context(hold(run))
            if main and waiting:
                check_settings(resolved)
        broken, films = read_films(resolved, run_folder.read_manifest(run).get("films")) if waiting else ({}, None)
        with together("the check of prompts and rewards", str(run)):
            if main and waiting:
                check(resolved, lambda studies: initial_policy(resolved, None, studies), broken)
    with together("the run folder", str(run)):
        if main:
            if not run.exists():
                held.enter_context(hold(run))
            run_folder.open_run(run, dump_recipe(resolved))
            if waiting:
                run_folder.update_manifest(run, films=films)
            for stage in resolved.stages:
                if stage.name not in waiting:  # what a kill between the last step and the end of the stage left
                    checkpoint.clear(run_folder.stage_folder(run, stage.name))
            if not waiting:
                console.print(f"{run}: nothing to train, every stage is finished", soft_wrap=True, highlight=False)
    stages = [stage for stage in resolved.stages if stage.name in waiting]
    if stages and (ranks.world() > 1 or resolved.jobs == 1):
        with together("the run folder", str(run)):
            see(run / "recipe.yaml")
        for stage in stages:
            run_stage(resolved, run, stage)
            gc.collect()  # the policy, its reference and their optimiser, which hold each other
    elif stages:
        run_side_by_side(resolved, run, stages)


def run_side_by_side(recipe: Recipe, run: Path, waiting: Sequence[StageConfig]) -> None:
    """Runs stages as processes of their own, `jobs` at a time, each as soon as the stages that it needs are done.

    A stage that fails does not stop those that run; then the error is raised. A signal that asks for a stop goes to all
    of them, and is raised here when all have written their checkpoints.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    told = False
    # Threads that spin while they wait take the cores of the stages beside them.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    queue = list(waiting)
    signals.at_once(False)
    try:
        while queue or running:
            if signals.asked() and not told:
                told = True
                queue.clear()
                for process in running.values():
                    process.send_signal(signals.asked())
            for stage in list(queue):
                needs = needed(recipe, stage)
                ready = all(run_folder.final_folder(run, name).exists() for name in needs)
                if ready and not failed and len(running) < recipe.jobs:
                    command = [sys.executable, "-m", "unirg.stages", str(run), stage.name]
                    # Apart from the terminal: a Ctrl-C comes from here, once.
                    running[stage.name] = subprocess.Popen(command, env=environment, start_new_session=True)
                    queue.remove(stage)
            if not running:
                break
            for name, process in list(running.items()):
                try:
                    if (status := process.wait(timeout=0.2)) != 0:
                        failed.append(f"stage {name} {signals.ended_by(status)}")
                    del running[name]
                except subprocess.TimeoutExpired:
                    continue
    finally:
        for process in running.values():  # a second Ctrl-C, or an error of ours
            process.kill()
    signals.at_once(True)
    if failed:
        raise UserError(f"{', '.join(failed)}; the same command goes on from there")


def beside(recipe: Recipe, stage: StageConfig) -> int:
    """How many stages share the cores while this one runs: those that start where it starts, at most `jobs`.

    It follows from the recipe alone: with another number of threads, sums would be taken in another order.
    """
    return min(recipe.jobs, sum(recipe.start_of(other) == recipe.start_of(stage) for other in recipe.stages))


def needed(recipe: Recipe, stage: StageConfig) -> set[str]:
    """The stages that must be finished before this one can run."""
    needs = {recipe.start_of(stage)}
    if isinstance(stage, GrpoStage) and stage.loss.kl and stage.kl.reference != "start":
        needs.add(stage.kl.reference)
    return needs - {INITIAL}


def start_folder(recipe: Recipe, run: Path, stage: StageConfig) -> Path | None:
    """The model folder that the stage starts from; None for a policy as the recipe's `policy` gives it."""
    start = recipe.start_of(stage)
    return None if start == INITIAL else run_folder.final_folder(run, start)


def initial_policy(recipe: Recipe, folder: Path | None, studies: Sequence[Study]) -> Policy:
    """The policy as built or loaded, or as the stage that left `folder` left it."""
    texts: list[str] = []
    if folder is None and recipe.policy.model is None:
        for study in studies:
            parts = build_messages(study, recipe.prompt)[0]["content"]
            texts += [part["text"] for part in parts if part["type"] == "text"] + [report_text(study)]
    return load_policy(recipe.policy, recipe.prompt, texts=texts, seed=recipe.seed, folder=folder)


def run_stage(recipe: Recipe, run: Path, stage: StageConfig) -> None:
    """One stage, from its checkpoint if it has one, to its final model folder. All ranks call it."""
    watchdog.comes_to("start", step=f"the start of stage {stage.name}")
    torch.set_num_threads(recipe.threads or max(1, THREADS // beside(recipe, stage)))
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.policy.dtype == "bfloat16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.trackers) or None,
        project_dir=str(run / "trackers" / stage.name),
    )
    world = accelerator.num_processes
    check_shares(stage, world)
    if recipe.trackers:
        accelerator.init_trackers(recipe.name, init_kwargs={"wandb": {"name": f"{recipe.name}-{stage.name}"}})
    config = stage.data or recipe.data
    with together("loading", f"stage {stage.name}"):  # a model or a folder may be missing on one host alone
        if accelerator.is_main_process:
            held = hold(run_folder.stage_folder(run, stage.name))  # noqa: F841 - released when the stage ends
        studies = load_studies(config, "train")
        start = start_folder(recipe, run, stage)
        # The tokenizer is trained on the recipe's own training texts, whatever the first stage reads.
        corpus = studies if start or config == recipe.data else load_studies(recipe.data, "train")
        policy = initial_policy(recipe, start, corpus)
    work = StageRun(recipe, stage, run, accelerator, policy, studies)
    if accelerator.is_main_process:
        run_folder.update_manifest(run, seed=recipe.seed, data={stage.name: fingerprint(studies)}, world_size=world)
        what = f"{type(stage).__name__.removesuffix('Stage').lower()}, {stage.steps} steps"
        console.print(f"[bold]{stage.name}[/bold]  {what}, from {recipe.start_of(stage)}", highlight=False)
    strategy, half = recipe.distributed.strategy, policy.config.dtype == "bfloat16"
    unsharded = outline(policy.model) if strategy != "ddp" and world > 1 else None
    if strategy != "ddp" and world == 1:
        work.warn(
            f"distributed.strategy: {strategy} shards nothing here: this is one process (torchrun starts several)"
        )
    if isinstance(stage, VisionStage):
        policy.model.to(accelerator.device)
        if (tower := vision_tower(policy.base)) is not None:
            # A base under adapters may be in bfloat16, where small steps round to none.
            tower.requires_grad_(True).float()
        from unirg.vision import run_vision

        run_vision(work)
    else:
        from unirg.grpo.loop import load_reference

        if unsharded is not None and policy.reads_images and any(prompt_images(s, recipe.prompt) for s in studies):
            policy.blank = blank_prompt(policy)
        # Before the policy is sharded: it may be the reference.
        reference = load_reference(work) if isinstance(stage, GrpoStage) else None
        distribute(policy.model, strategy, accelerator, half=half)
        if reference is not None:
            distribute(reference.model, beside_engine(strategy), accelerator, half=half, trained=False)
        with ExitStack() as engines:  # their workers end with the stage
            rewards = evaluate = None
            if isinstance(stage, GrpoStage):
                check_trainable(stage.rewards)
                rewards = engines.enter_context(scoring_engine(work, stage.rewards, "rewards"))
                if accelerator.is_main_process:
                    run_folder.update_manifest(run, rewards={stage.name: rewards.identities()})
            dev, metrics = dev_studies(work), recipe.evaluation.metrics
            if dev or isinstance(stage, GrpoStage):
                sampler = stage_sampler(work, dev)
                engines.callback(sampler.close)
            if dev:
                scores = None
                if metrics and accelerator.is_main_process:
                    scores = engines.enter_context(scoring_engine(work, metrics, "metrics", rewards))
                evaluate = dev_evaluation(work, dev, sampler, scores)
            if isinstance(stage, SftStage):
                from unirg.sft import run_sft

                run_sft(work, evaluate)
            else:
                from unirg.grpo.loop import run_grpo

                assert rewards is not None
                run_grpo(work, sampler, rewards, evaluate, reference)
    if unsharded is not None:
        full = filled(unsharded, policy.model, accelerator.is_main_process)
        policy = replace(policy, model=full, engine=None)
    with work.together("final policy"):
        if accelerator.is_main_process:
            put_in_place(policy, run_folder.final_folder(run, stage.name))
            checkpoint.clear(work.folder)
    with work.together("final policy"):
        see(run_folder.final_folder(run, stage.name))
    signals.at_once(True)  # they waited since the last step
    if recipe.trackers:
        accelerator.end_training()


def stage_sampler(work: StageRun, dev: Sequence[Study]) -> Sampler:
    """The recipe's engine for the stage's samples, and for its reports of the `dev` studies."""
    stage, recipe = work.stage, work.recipe
    sampling = SamplingConfig(max_new_tokens=max_new_tokens(recipe))
    if isinstance(stage, GrpoStage):
        longest = max(stage.sampling.max_new_tokens, sampling.max_new_tokens if dev else 0)
        sampling = stage.sampling.model_copy(update={"max_new_tokens": longest, "rows_per_forward": stage.rows})
    return open_sampler(
        recipe.rollout,
        work.policy,
        sampling,
        images=max(len(prompt_images(study, recipe.prompt)) for study in (*work.studies, *dev)),
        ranks=work.accelerator.num_processes,
        apart=isinstance(stage, GrpoStage) and stage.ahead,
    )


def put_in_place(policy: Policy, final: Path) -> None:
    """The stage's result: `final` exists when it is whole and on disk. Raises UserError where the disk is full."""
    part = final.with_name(".final.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        policy.save(part)
    except SafetensorError as error:
        raise UserError(f"{part}: cannot be written ({error}); make room, and the same command goes on") from error
    for path in (*part.iterdir(), part):
        run_folder.sync(path)
    part.rename(final)
    run_folder.sync(final.parent)


def write_reports(recipe: Recipe, run: Path, stage: str) -> None:
    """The finished stage's reports of the studies that the evaluation will read, if it is to be evaluated."""
    wanted = recipe.evaluation.stages
    if not recipe.evaluation.splits or (wanted is not None and stage not in wanted):
        return
    splits = {split: load_studies(recipe.data, split) for split in recipe.evaluation.splits}
    everyone = [study for studies in splits.values() for study in studies]
    with report_writer(recipe, run_folder.final_folder(run, stage), everyone) as writer:
        for split, studies in splits.items():
            stage_predictions(run, recipe, stage, split, studies, writer=writer)


def scoring_engine(
    work: StageRun, configs: Sequence[RewardConfig], kind: str, beside: ScoringEngine | None = None
) -> ScoringEngine:
    """This rank's supervised engine; what the rewards print goes to the stage's folder `workers/<kind>`."""
    rank = f"-rank{work.accelerator.process_index}" if work.accelerator.num_processes > 1 else ""
    return ScoringEngine(configs, supervised=True, logs=work.folder / "workers" / f"{kind}{rank}", beside=beside)


def finish(recipe: Recipe, run: Path) -> None:
    """Gathers metrics, evaluates the configured splits and writes the report, unless all of it is there."""
    from unirg.evaluation.command import evaluate
    from unirg.report import build as build_report

    if evaluated(recipe, run):
        console.print(f"report: {run / 'report.html'}", soft_wrap=True, highlight=False)
        return
    run_folder.gather_metrics(run, [stage.name for stage in recipe.stages])
    if writes_reports(recipe):
        evaluate(run)  # every split of the recipe; it writes the report
    else:
        build_report(run)


def writes_reports(recipe: Recipe) -> bool:
    """Whether any stage of the recipe leaves a policy that writes reports."""
    return any(not isinstance(stage, VisionStage) for stage in recipe.stages)


def evaluated(recipe: Recipe, run: Path) -> bool:
    """Whether the folder of a finished run has every evaluation and the report, newer than its policies and recipe."""
    written = [run / "report.html"]
    if writes_reports(recipe):
        written += [run / "evaluation" / f"{split}.json" for split in recipe.evaluation.splits]
    read = [run / "recipe.yaml", *[run_folder.final_folder(run, stage.name) for stage in recipe.stages]]
    if not all(path.exists() for path in (*written, *read)):
        return False
    return min(path.stat().st_mtime for path in written) > max(path.stat().st_mtime for path in read)


def _stages_alone(run: Path, names: Sequence[str]) -> int:
    """`python -m unirg.stages RUN STAGE...`: what a run side by side starts. Returns the exit status."""
    recipe, told = load_recipe(run / "recipe.yaml"), ", ".join(names)
    signals.end_with_parent()
    try:
        ranks.check_restarts()
        with signals.handled(), in_words(str(run)), joined(recipe.distributed.timeout):
            for stage in (stage for stage in recipe.stages if stage.name in names):
                if not run_folder.final_folder(run, stage.name).exists():
                    run_stage(recipe, run, stage)
                    if not isinstance(stage, VisionStage) and ranks.world() == 1:
                        write_reports(recipe, run, stage.name)  # here, where they are written side by side
    except signals.Stopped as stopped:
        print(f"{told}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        tell(error, f"{told}: ")
        return 2
    return 0


if __name__ == "__main__":
    end(_stages_alone(Path(sys.argv[1]), sys.argv[2:]))
