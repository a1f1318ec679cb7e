"""`unirg plan RECIPE`: what a run needs and how long it takes, on paper."""

import argparse
import contextlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from unirg.check import check_shares
from unirg.errors import UserError
from unirg.plan.compute import stage_cost
from unirg.plan.disk import run_bytes
from unirg.plan.machine import RESERVE, Cluster, machine
from unirg.plan.memory import weights_of
from unirg.plan.policy import Given, Lengths, in_depth, parameters, plan_policy
from unirg.plan.stage import REWARD_SECONDS, Setting, plan_stage
from unirg.plan.view import show
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import Recipe


def plan(arguments: argparse.Namespace) -> int:
    """Prints the plan; returns 1 where a stage does not fit, else 0. Raises UserError for bad input."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for name, least in (("gpus", 1), ("nodes", 1), ("sampling_gpus", 0), ("prompt_tokens", 1), ("films", 0)):
        _at_least(arguments, name, least)
    _at_least(arguments, "report_tokens", 1)
    share = arguments.compute_share
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--compute-share: expected a share above 0 and at most 1, got {share}")
    if recipe.threads and arguments.gpu.lower() == "cpu":  # as the run will have them
        torch.set_num_threads(recipe.threads)
    names = {"text": "prompt_tokens", "films": "films", "report": "report_tokens"}
    lengths = {key: value for key, name in names.items() if (value := getattr(arguments, name)) is not None}
    found = make_plan(
        recipe,
        Cluster(machine(arguments.gpu, share), arguments.nodes, arguments.gpus, arguments.sampling_gpus),
        config=arguments.config,
        given=Given(**lengths) if lengths else None,
        reward_seconds=parse_seconds(arguments.reward_seconds, recipe),
    )
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if all(stage["fits"] for stage in found["stages"]) else 1


def _at_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(arguments, name)
    if value is not None and value < least:
        raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def parse_seconds(texts: Sequence[str], recipe: Recipe) -> dict[str, float]:
    """`r1=0.001` as {"r1": 0.001}. Raises UserError for what is no such pair, and for rewards that no stage has."""
    rewards = [reward for stage in recipe.stages for reward in getattr(stage, "rewards", [])]
    labels = {reward.log_label for reward in (*rewards, *recipe.evaluation.metrics)}
    found = {}
    for text in texts:
        label, _, value = text.partition("=")
        try:
            found[label] = float(value)
        except ValueError as error:
            raise UserError(f"--reward-seconds: expected LABEL=SECONDS such as r1=0.001, got '{text}'") from error
        if label not in labels:
            there = ", ".join(sorted(labels)) or "none"
            raise UserError(f"--reward-seconds: the recipe has no reward or metric '{label}'; there are {there}")
        if not 0 <= found[label] < float("inf"):
            raise UserError(f"--reward-seconds: expected seconds of 0 or more, got '{text}'")
    return found


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    config: Path | None,
    given: Given | None,
    reward_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The whole plan as what `--json` prints."""
    for stage in recipe.stages:
        check_shares(stage, cluster.world)
    cluster = with_servers(recipe, cluster)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' advice on loading is not about a plan
        policy, lengths = plan_policy(recipe, config, given)
        policies = in_depth(recipe, policy)
    if given is not None and len(lengths.prompt) > (limit := recipe.policy.max_prompt_tokens):
        raise UserError(
            f"--prompt-tokens, --films: they make a prompt of {len(lengths.prompt)} tokens, and "
            f"policy.max_prompt_tokens allows {limit}"
        )
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    stages = []
    done: list[tuple[Any, Any]] = []
    for stage in recipe.stages:
        alike = stage.model_copy(update={"name": "", "sees": "", "steps": 1, "start": None, "data": None})
        cost = next((cost for other, cost in done if other == alike), None)
        if cost is None:
            cost = stage_cost(policies, lengths, recipe, stage, cluster.world)
            done.append((alike, cost))
        weights = weights_of(policy, stage)
        stages.append(plan_stage(Setting(recipe, stage, weights, cost, lengths, cluster, reward_seconds)))
    return {
        "recipe": recipe.name,
        "policy": recipe.policy.model or "tiny",
        "parameters": parameters(policy),
        "trained_parameters": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
        "machine": asdict(cluster.machine),
        "nodes": cluster.nodes,
        "gpus": cluster.gpus,
        "sampling_gpus": cluster.sampling_gpus,
        "strategy": recipe.distributed.strategy if cluster.world > 1 else "one process",
        "engine": recipe.rollout.engine,
        "lengths": _lengths(lengths),
        "disk": run_bytes(recipe, policy),
        "stages": stages,
        "assumptions": assumptions(recipe, cluster, lengths),
    }


def with_servers(recipe: Recipe, cluster: Cluster) -> Cluster:
    """The cluster with a GPU for each of the recipe's vLLM servers, where it says no number of them. Raises UserError
    where these are too few, or there are no servers."""
    servers = recipe.rollout.vllm.servers if recipe.rollout.engine == "vllm" else []
    if cluster.sampling_gpus and not servers:
        raise UserError(
            "--sampling-gpus: the recipe samples on the training GPUs; set rollout.engine=vllm, "
            "rollout.vllm.mode=server and rollout.vllm.servers=[...]"
        )
    if 0 < cluster.sampling_gpus < len(servers):
        raise UserError(
            f"--sampling-gpus: {cluster.sampling_gpus} are fewer than the {len(servers)} servers that "
            "rollout.vllm.servers names, each with a GPU of its own"
        )
    return replace(cluster, sampling_gpus=cluster.sampling_gpus or len(servers))


def _lengths(lengths: Lengths) -> dict[str, Any]:
    return {
        "prompt": len(lengths.prompt),
        "longest_prompt": len(lengths.longest_prompt),
        "report": lengths.report,
        "longest_report": lengths.longest_report,
        "source": lengths.source,
    }


def assumptions(recipe: Recipe, cluster: Cluster, lengths: Lengths) -> list[str]:
    """What the figures stand on, one sentence each."""
    device = cluster.machine
    if device.measured:
        said = [
            f"rates measured on this CPU, one rank alone: {device.single / 1e9:.0f} GFLOP/s in float32, "
            f"{device.half / 1e9:.0f} in bfloat16, {device.bandwidth / 1e9:.0f} GB/s, {device.launch * 1e6:.1f} us an "
            "operation"
        ]
    else:
        said = [
            f"nothing was measured on a {device.name}: published peaks ({device.half / 1e12:.0f} TFLOP/s bfloat16, "
            f"{device.single / 1e12:.3g} float32, {device.bandwidth / 1e12:.2f} TB/s), of which products reach "
            f"{device.compute_share:.0%} and memory {device.bandwidth_share:.0%}; {device.launch * 1e6:.0f} us to "
            f"start an operation; {RESERVE / 1e9:.1f} GB for CUDA, libraries and communication"
        ]
        if cluster.world > 1:
            where = "between nodes" if cluster.nodes > 1 else "within the node"
            said.append(
                f"{cluster.link / 1e9:.0f} GB/s a GPU {where}; sharded weights are gathered while computing goes on"
            )
    said.append(
        f"lengths: {lengths.source}; every study has a prompt of {len(lengths.prompt)} tokens (the longest has "
        f"{len(lengths.longest_prompt)}) and reports of {lengths.report} (the longest {lengths.longest_report})"
    )
    if lengths.reading is None:
        said.append("studies are read in no time: there are none here to measure")
    else:
        keeps = "each once by every rank, which keeps them" if lengths.kept else "anew in every epoch"
        said.append(f"a study is read in {lengths.reading * 1000:.3g} ms, measured on this CPU; {keeps}")
    if recipe.rollout.engine == "vllm":
        served = recipe.rollout.vllm.mode == "server"
        rows = f"{device.vllm_rows} (a server's default)" if served else "sampling.rows_per_forward"
        said.append(f"vLLM decodes at most {rows} reports at once, limited by its bandwidth or products alone")
        if served:
            said.append(f"weights go to the servers, which the ranks share, at {device.stream / 1e9:.3g} GB/s a rank")
    elif any(getattr(stage, "ahead", False) for stage in recipe.stages):
        said.append("one step ahead, the policy and its copy that samples take turns on one device: no time is saved")
    said += [
        "rewards and metrics: "
        + ", ".join(f"{name} {value:.2g}" for name, value in REWARD_SECONDS.items())
        + " CPU seconds a report (benchmarks/README.md) where not given, on whatever device the recipe puts them; a "
        "worker for each on every rank, those of servers too; metrics of an evaluation on the first rank alone",
        f"checkpoints go to disk at {device.disk / 1e9:.3g} GB/s, all ranks together; the best policy is written at "
        "every evaluation",
        "left out: the evaluation at the end, which one process makes; loading, the first step's self-check, "
        "resampling, waiting for slower ranks",
    ]
    return said
