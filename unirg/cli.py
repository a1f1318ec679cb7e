"""The command line: verbs only. Each imports what it needs when it is called, and hands over to one function.

Exit status: 0 done, 1 a check failed, 2 bad input (one line each on stderr), 130 interrupted; a training that a signal
asked to stop ends with 128 and the signal's number.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import unirg
from unirg.errors import UserError, tell
from unirg.signals import Stopped

Add = Callable[..., argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Raises SystemExit where the arguments themselves are wrong."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse does not take `RECIPE --output DIR a.b=c`: what it leaves over are overrides, where the verb has any.
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except UserError as error:
        tell(error)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        resume = ": the same command goes on from the last checkpoint" if arguments.verb == "train" else ""
        print(f"interrupted{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`unirg ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unirg", description=unirg.__doc__)
    parser.add_argument("--version", action="version", version=unirg.__version__)
    add = parser.add_subparsers(dest="verb", metavar="VERB", required=True).add_parser
    _train_verbs(add)
    _rollout_verbs(add)
    _recipe_verbs(add)
    _data_verbs(add)
    _evaluation_verbs(add)
    _scoring_verbs(add)
    return parser


def _verb(add: Add, name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser = add(name, help=summary, description=summary.replace("%%", "%"))
    parser.set_defaults(run=run)
    return parser


def _takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see docs/recipe_reference.md")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as stages.grpo.steps=10")


def _train_verbs(add: Add) -> None:
    def train(arguments: argparse.Namespace) -> int:
        from unirg.stages import train

        # As JSON, so that a folder called 12 or true stays a text.
        output = [f"output={json.dumps(str(arguments.output))}"] if arguments.output else []
        return train(arguments.recipe, [*arguments.overrides, *output])

    parser = _verb(add, "train", "run a recipe's stages; on a run folder with checkpoints, go on from them", train)
    _takes_recipe(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run folder (the recipe's `output`)")

    def doctor(arguments: argparse.Namespace) -> int:
        from unirg.doctor import doctor

        return doctor(arguments.recipe, arguments.overrides, as_json=arguments.json)

    parser = _verb(add, "doctor", "is this node fit to run: what is wrong, in words; under torchrun all nodes", doctor)
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="also what this recipe needs")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as output=/scratch/run")
    parser.add_argument("--json", action="store_true", help="one JSON list of findings")

    def plan(arguments: argparse.Namespace) -> int:
        from unirg.plan.command import plan

        return plan(arguments)

    summary = "memory, tokens, FLOPs and hours of a run on a cluster, on paper; status 1 where it does not fit"
    parser = _verb(add, "plan", summary, plan)
    _takes_recipe(parser)
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="h100 (default), h200, a100-80, ... or cpu: this")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="training GPUs of a node; default 8")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="training nodes; default 1")
    parser.add_argument("--sampling-gpus", type=int, default=0, metavar="M", help="GPUs of vLLM servers beside them")
    parser.add_argument("--config", type=Path, metavar="PATH", help="the model's config.json, or a folder with it")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="of the prompt's text; default the data's, or 200"
    )
    parser.add_argument("--films", type=int, metavar="N", help="films of a prompt; default the data's, or 1")
    parser.add_argument("--report-tokens", type=int, metavar="N", help="of a report; default the data's, or 120")
    parser.add_argument("--reward-seconds", action="append", default=[], metavar="LABEL=S", help="for one report")
    parser.add_argument("--compute-share", type=float, metavar="SHARE", help="of the peak, in products; default 0.5")
    parser.add_argument("--json", action="store_true", help="one JSON object")

    def report(arguments: argparse.Namespace) -> int:
        from unirg.report import build

        print(build(arguments.folder))
        return 0

    parser = _verb(add, "report", "write a run's report.html", report)
    parser.add_argument("folder", type=Path, metavar="RUN")


def _rollout_verbs(add: Add) -> None:
    def rollout_server(arguments: argparse.Namespace) -> int:
        from unirg.rollout.vllm_launch import serve

        return serve(arguments.model, arguments.options)

    summary = "a vLLM server that takes a run's weights and samples for it (rollout.vllm.servers)"
    parser = _verb(add, "rollout-server", summary, rollout_server)
    parser.add_argument("model", metavar="MODEL", help="the folder or hub id that the run's policy starts from")
    help = "vLLM's own, such as --port 8001 --tensor-parallel-size 2 --max-model-len 4352 --host 10.0.0.7"
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help=help)


def _recipe_verbs(add: Add) -> None:
    recipe = add("recipe", help="show, check and document recipes")
    add = recipe.add_subparsers(metavar="VERB", required=True).add_parser

    def show(arguments: argparse.Namespace) -> int:
        from unirg.recipe import command

        return command.show(arguments.recipe, arguments.overrides)

    _takes_recipe(_verb(add, "show", "print the recipe as resolved: base, interpolation, overrides, defaults", show))

    def check(arguments: argparse.Namespace) -> int:
        from unirg.recipe import command

        return command.check(arguments.paths)

    parser = _verb(add, "check", "validate recipes; by default every one under recipes/", check)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("recipes")], metavar="FILE_OR_FOLDER")

    def docs(arguments: argparse.Namespace) -> int:
        from unirg.recipe import command

        return command.docs(arguments.page, arguments.check)

    parser = _verb(add, "docs", "write the reference page of all keys", docs)
    parser.add_argument("page", nargs="?", type=Path, default=Path("docs/recipe_reference.md"), metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page is out of date")


def _data_verbs(add: Add) -> None:
    data = add("data", help="look at data before training on it")
    add_below = data.add_subparsers(metavar="VERB", required=True).add_parser

    def check(arguments: argparse.Namespace) -> int:
        from unirg.data.command import check

        return check(arguments.source, arguments.overrides, arguments.splits.split(",") if arguments.splits else None)

    parser = _verb(add_below, "check", "read every study once: counts, examples, and every bad row by name", check)
    parser.add_argument("source", type=Path, metavar="RECIPE_OR_FILE", help="a recipe, or a .jsonl or .csv of studies")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as data.images=/path")
    parser.add_argument("--splits", metavar="NAMES", help="comma list such as train,dev; default all")

    def fetch(arguments: argparse.Namespace) -> int:
        from unirg.data.command import fetch

        return fetch(arguments.name, arguments.to)

    parser = _verb(add_below, "fetch", "download Open-i's reports (29 MB, through pip; CC BY-NC-ND 4.0)", fetch)
    parser.add_argument("name", choices=["openi"])
    parser.add_argument("--to", type=Path, metavar="DIR", help="then set UNIRG_OPENI to it; default ~/.cache/unirg")

    def extract(arguments: argparse.Namespace) -> int:
        from unirg.extraction.command import run

        return run(arguments.reports, as_json=arguments.json, labels=arguments.labels)

    parser = _verb(add, "extract", "what the rule-based reader finds in reports", extract)
    parser.add_argument("reports", type=Path, metavar="REPORTS", help="JSONL or CSV with `id` and `report`")
    parser.add_argument("--json", action="store_true", help="one JSON object per report")
    parser.add_argument("--labels", choices=["chexpert14", "cxr14"], help="a label vector per report instead")


def _evaluation_verbs(add: Add) -> None:
    def evaluate(arguments: argparse.Namespace) -> int:
        from unirg.evaluation.command import evaluate

        stages = arguments.stages.split(",") if arguments.stages else None
        baseline = arguments.baseline
        overrides, as_json = arguments.overrides, arguments.json
        return evaluate(
            arguments.folder, arguments.split, stages=stages, baseline=baseline, overrides=overrides, as_json=as_json
        )

    parser = _verb(add, "evaluate", "greedy reports of a run's stages and every figure about them", evaluate)
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as rollout.engine=hf")
    parser.add_argument("--split", metavar="NAME", help="default: the recipe's `evaluation.splits`")
    parser.add_argument("--stages", metavar="NAMES", help="comma list; default all that write reports")
    parser.add_argument("--baseline", metavar="STAGE", help="compare with this stage, study by study")
    parser.add_argument("--json", action="store_true", help="one JSON object per split")

    def generate(arguments: argparse.Namespace) -> int:
        from unirg.evaluation.command import generate

        return generate(
            arguments.target,
            arguments.out,
            split=arguments.split,
            data=arguments.data,
            stage=arguments.stage,
            temperature=arguments.temperature,
            overrides=arguments.overrides,
        )

    parser = _verb(add, "generate", "write reports as JSONL; goes on where an earlier call stopped", generate)
    parser.add_argument(
        "target", type=Path, metavar="RUN_OR_MODEL", help="a run folder, or a Hugging Face model folder"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as data.images=/path")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL of `id` and `report`")
    parser.add_argument("--data", type=Path, metavar="RECIPE", help="the recipe whose data and prompt to use")
    parser.add_argument("--split", default="test", metavar="NAME", help="default test")
    parser.add_argument("--stage", metavar="STAGE", help="the run's stage; default its last")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0, greedy")

    def compare(arguments: argparse.Namespace) -> int:
        from unirg.evaluation.command import compare

        files = (arguments.a, arguments.b)
        return compare(*files, data=arguments.data, split=arguments.split, as_json=arguments.json)

    parser = _verb(add, "compare", "two files of reports, study by study: B minus A with 95%% intervals", compare)
    parser.add_argument("a", type=Path, metavar="A", help="JSONL of `id`, `report` and `reference`")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--data", type=Path, metavar="RECIPE", help="take references and labels from its data")
    parser.add_argument("--split", default="test", metavar="NAME", help="with --data; default test")
    parser.add_argument("--json", action="store_true")


def _scoring_verbs(add: Add) -> None:
    def score(arguments: argparse.Namespace) -> int:
        from unirg.scoring.command import score

        files = (arguments.references, arguments.candidates)
        return score(*files, arguments.rewards, as_json=arguments.json, summary=arguments.summary)

    parser = _verb(add, "score", "score a file of reports against a file of references", score)
    parser.add_argument("--rewards", required=True, metavar="NAMES", help="such as bleu(variant=coco4),entity_f1")
    parser.add_argument("--references", required=True, type=Path, metavar="FILE", help="JSONL or CSV, rows by `id`")
    parser.add_argument("--candidates", required=True, type=Path, metavar="FILE", help="the reports to score, same ids")
    parser.add_argument("--json", action="store_true", help="one JSON object per study")
    parser.add_argument("--summary", action="store_true", help="then the means with 95%% intervals")

    def audit(arguments: argparse.Namespace) -> int:
        from unirg.scoring.audit import audit

        return audit(
            arguments.recipe,
            arguments.overrides,
            rewards=arguments.rewards,
            references=arguments.references,
            as_json=arguments.json,
            plot=arguments.plot,
        )

    summary = "what a policy would learn: rewards on controlled changes of reports; status 1 where a harmful one wins"
    parser = _verb(add, "audit", summary, audit)
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="audits its GRPO stages' rewards")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as data.train=500")
    parser.add_argument("--rewards", metavar="NAMES", help="instead of a recipe; such as bleu,entity_f1(level=side)")
    parser.add_argument("--references", type=Path, metavar="FILE", help="with --rewards: JSONL or CSV of reports")
    parser.add_argument("--json", action="store_true", help="one JSON object per stage")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, such as audit.png")

    def rewards(arguments: argparse.Namespace) -> int:
        from unirg.scoring.command import list_rewards

        return list_rewards(as_json=arguments.json)

    parser = _verb(
        add, "rewards", "the rewards installed, what each measures and needs; or write and check one", rewards
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per reward")
    add_below = parser.add_subparsers(metavar="VERB").add_parser

    def new(arguments: argparse.Namespace) -> int:
        from unirg.scoring.new_reward import new_reward

        print(f"{new_reward(arguments.name)}: a package of one reward and its test; docs/write_a_reward.md goes on")
        return 0

    parser = _verb(add_below, "new", "write a package of one reward and its test into a new folder, here", new)
    parser.add_argument("name", metavar="NAME", help="such as my_reward")

    def check(arguments: argparse.Namespace) -> int:
        from unirg.scoring.check_reward import check_reward

        return check_reward(arguments.reward, arguments.timeout)

    summary = "is a reward right, and what would a policy learn from it; status 1 where it breaks the contract"
    parser = _verb(add_below, "check", summary, check)
    parser.add_argument("reward", metavar="REWARD", help="such as path.py:fn, bleu or bleu(variant=coco4)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="what a call may take; default 60"
    )

    def serve(arguments: argparse.Namespace) -> int:
        from unirg.scoring.serve import serve

        return serve(
            arguments.recipe,
            arguments.overrides,
            rewards=arguments.rewards,
            stage=arguments.stage,
            host=arguments.host,
            port=arguments.port,
            token_file=arguments.token_file,
            logs=arguments.logs,
        )

    parser = _verb(add_below, "serve", "score for the trainers of several nodes, until told to end", serve)
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="its rewards that name a `server`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as the trainers have them")
    parser.add_argument("--rewards", metavar="NAMES", help="instead of a recipe; such as bleu,entity_f1(level=side)")
    parser.add_argument("--stage", metavar="STAGE", help="this stage's alone; default all of the recipe's")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; any other wants a token")
    parser.add_argument("--port", type=int, default=8100, help="default 8100")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="default: UNIRG_REWARDS_TOKEN of the environment"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the rewards print there")
