"""How much of the rewards' time a GRPO step hides: the demo's GRPO settings with a RadGraph-sized model beside them.

    python benchmarks/hidden_rewards.py                     # --steps 2 for less
    python benchmarks/hidden_rewards.py --milliseconds 1 3  # a stand-in that only waits so long for each report

The stage is `grpo_reports` of recipes/demo.yaml as it stands (24 studies x 16 reports of up to 48 tokens, 6 of the 16
trained), and once more with all 16 trained, after a short warm start. Beside the demo's own two rewards stands
`radgraph_f1` on an archive of BERT-base size with random weights, on one CPU thread of its own; or, with
--milliseconds, a reward that does nothing but wait: what a faster device would leave to hide. Its weight is 0, so that
all settings train alike. Each runs in five ways, from the same policy:

- inline: rewards in the training process, nothing is hidden;
- at the end: workers get a step's reports when the last of them is sampled;
- as finished: workers get reports while longer ones are sampled;
- as it is: and they read the references of a step before its reports are there;
- one ahead: a step's reports are sampled, and scored, while the step before is learnt from (the stage's `ahead`). They
  come from the policy of one update earlier: another trajectory.

Seconds are wall time, since hiding is about waiting: two cores must be free. The bound is what no order of work could
pass on the same policy: rewards can run unseen while reports are sampled, while the first forward is made (unless
scores decide what is trained), and on references whenever they like. One step ahead they can run all the time.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the archives' builder is the tests'

from tests import radgraph_archives  # noqa: E402
from unirg.data import load_studies  # noqa: E402
from unirg.grpo import loop, rollouts  # noqa: E402
from unirg.prompt import report_text  # noqa: E402
from unirg.recipe.load import load_recipe  # noqa: E402
from unirg.recipe.schema import GrpoStage, Recipe  # noqa: E402
from unirg.rollout.hf import CopySampler, HFSampler  # noqa: E402
from unirg.scoring.contract import RewardConfig  # noqa: E402
from unirg.scoring.engine import ScoringEngine  # noqa: E402
from unirg.scoring.worker_process import Worker  # noqa: E402
from unirg.sft import run_sft  # noqa: E402
from unirg.stages import initial_policy  # noqa: E402
from unirg.training import StageRun, Stopwatch  # noqa: E402

AHEAD = "one ahead"
WAYS = ("inline", "at the end", "as finished", "as it is", AHEAD)
WARM_START = 100  # SFT steps: reports end where reports end, and repeat one another
COLUMNS = 96  # of a timeline
BERT_BASE = {"hidden": 768, "layers": 12, "heads": 12, "max_length": 512, "scorer_width": 150, "layer_scale": 0.5}
BIASES = {"ner_bias": -1.65, "relation_bias": 1.25}
WAITS = """
import time

class Waits:
    \"\"\"Waits for each report that it has not seen.\"\"\"

    def __init__(self, seconds: float):
        self.seconds, self.seen = seconds, set()

    def setup(self):
        pass

    def prepare(self, references):
        new = set(references) - self.seen
        time.sleep(self.seconds * len(new))
        self.seen |= new

    def score(self, candidates, references):
        self.prepare([*candidates, *references])
        return [float(len(text)) for text in candidates]
"""


@dataclass
class Clock:
    """What was done when, by the training process and by each worker: (what, start, end) in seconds."""

    training: list[tuple[str, float, float]] = field(default_factory=list)
    workers: dict[Worker, list[tuple[str, float, float]]] = field(default_factory=dict)


clock = Clock()


class TimedStopwatch(Stopwatch):
    """The loop's stopwatch, which also says when."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        with super().__call__(phase):
            yield
        clock.training.append((phase, started, time.perf_counter()))


def watch_workers() -> None:
    """Lets workers say when they are at what."""
    attempts = Worker._attempts

    def timed(self: Worker, *given: Any, **more: Any) -> Any:
        started = time.perf_counter()
        answer = attempts(self, *given, **more)
        request = next(part for part in given if isinstance(part, tuple))
        clock.workers.setdefault(self, []).append((request[0], started, time.perf_counter()))
        return answer

    Worker._attempts = timed  # type: ignore[method-assign]


def the_recipe(steps: int) -> Recipe:
    """The demo's, with as many studies as are read here."""
    overrides = ["data.train=2000", f"stages.sft.steps={WARM_START}", "stages.sft.start=policy"]
    overrides += [f"stages.grpo_reports.steps={steps}", "stages.grpo_reports.checkpoint_every=10000"]
    return load_recipe(ROOT / "recipes" / "demo.yaml", overrides)


def stage_run(recipe: Recipe, name: str, folder: Path, policy: Any, studies: Any) -> StageRun:
    stage = next(stage for stage in recipe.stages if stage.name == name)
    return StageRun(recipe, stage, folder, Accelerator(cpu=True), policy, studies)


def one_way(warm: StageRun, stage: GrpoStage, way: str, folder: Path) -> dict[str, Any]:
    """The steps of a stage, from the warm start's policy, and the means of all but the first, which checks forwards."""
    policy = copy.deepcopy(warm.policy)
    stage = stage.model_copy(
        update={
            "rewards": [r.model_copy(update={"worker": way != "inline"}) for r in stage.rewards],
            "ahead": way == AHEAD,
        }
    )
    work = StageRun(warm.recipe, stage, folder, warm.accelerator, policy, warm.studies)
    rollouts.AT_ONCE = 1_000_000 if way == "at the end" else 32
    loop.prepare_scoring = rollouts.prepare_scoring if way in ("as it is", AHEAD) else lambda *_: None
    clock.training.clear(), clock.workers.clear()
    with ScoringEngine(stage.rewards, supervised=True) as engine:
        sampler = (CopySampler if way == AHEAD else HFSampler)(policy)
        loop.run_grpo(work, sampler, engine, None, None)
    lines = [json.loads(line) for line in (work.folder / "metrics.jsonl").read_text().splitlines()]
    first = not loop.scores_decide(stage)
    starts = [start for phase, start, _ in clock.training if phase == "sampling"]
    prepared = [
        sum(end - start for what, start, end in own if what == "prepare" and start < starts[-1])
        for own in clock.workers.values()
    ]
    steps = [
        {
            "step": line["time/step"],
            "sampling": line["time/sampling"],
            "waited": line["time/scoring"],
            "rewards": line["time/rewards"],
            "hidden": line["time/scoring_hidden"],
            "update": line["time/logps"] + line["time/loss"] + line["time/backward"],
            "reward": line["reward"],
        }
        for line in lines
    ]
    mean = {name: fmean(step[name] for step in steps[1:]) for name in steps[0]}
    ahead = max(prepared, default=0.0) / len(starts)
    window = mean["sampling"] + ahead + (fmean(line["time/logps"] for line in lines[1:]) if first else 0.0)
    mean["bound"] = min(1.0, (mean["step"] if way == AHEAD else window) / mean["rewards"])
    return {"way": way, "steps": steps, "mean": mean, "line": timeline()}


def timeline() -> list[str]:
    """The last step but one as text, to where the next begins."""
    starts = [start for phase, start, _ in clock.training if phase == "sampling"]
    begin, end = starts[-2], starts[-1]

    def row(done: list[tuple[str, float, float]], letters: dict[str, str]) -> str:
        drawn = [" "] * COLUMNS
        for what, start, stop in done:
            if start < end and stop > begin:
                places = [int((at - begin) / (end - begin) * COLUMNS) for at in (max(start, begin), min(stop, end))]
                for column in range(places[0], max(places[0] + 1, places[1])):
                    drawn[min(column, COLUMNS - 1)] = letters.get(what, ".")
        return "".join(drawn)

    phases = {"sampling": "S", "scoring": "w", "self-check": "c", "logps": "F", "loss": "F", "backward": "B"}
    rows = [f"training  |{row(clock.training, phases)}|  {end - begin:.2f} s"]
    for number, done in enumerate(clock.workers.values(), 1):
        rows.append(f"worker {number}  |{row(done, {'score': '#', 'prepare': 'p'})}|")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="GRPO steps of each way, the first left out of means (4)")
    parser.add_argument("--milliseconds", type=float, nargs="*", help="a reward that waits, in place of RadGraph")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be 2 or more: the first is left out of the means")
    torch.set_num_threads(1)
    watch_workers()
    loop.Stopwatch = TimedStopwatch  # type: ignore[misc]
    recipe, results = the_recipe(options.steps), []
    with tempfile.TemporaryDirectory(prefix="unirg-benchmark-") as name:
        folder = Path(name)
        studies = load_studies(recipe.data, "train")
        words = {word.strip(".,;:").lower() for study in studies for word in report_text(study).split()}
        radgraph_archives.WORDS = " ".join(sorted(words))  # an encoder that knows the words, as trained ones do
        (folder / "waits.py").write_text(WAITS)
        own = [("radgraph_f1", {"model_folder": str(folder / "archive")})]
        if options.milliseconds:
            own = [(f"{folder}/waits.py:Waits", {"seconds": each / 1000}) for each in options.milliseconds]
        else:
            radgraph_archives.write_archive(folder / "archive", "radgraph-xl", **BERT_BASE, **BIASES)
        warm = stage_run(recipe, "sft", folder, initial_policy(recipe, None, studies), studies)
        print("warm start", file=sys.stderr)
        run_sft(warm, None)
        demo = next(stage for stage in recipe.stages if stage.name == "grpo_reports")
        assert isinstance(demo, GrpoStage)
        for model, settings in own:
            rewards = [*demo.rewards, RewardConfig(name=model, label="model", weight=0, options=settings)]
            for train_on in (demo.train_on, None):
                stage = demo.model_copy(update={"rewards": rewards, "train_on": train_on})
                title = f"{model.rpartition(':')[2]} {settings.get('seconds', '')}, train_on {train_on}"
                ways = [one_way(warm, stage, way, folder / f"{len(results)}-{way}") for way in WAYS]
                results.append({"setting": title, "ways": ways})
                if not options.json:
                    show(results[-1])
    if options.json:
        print(json.dumps({"unit": "wall seconds of a step", "threads": 1, "results": results}))


def show(result: dict[str, Any]) -> None:
    console = Console(width=130)
    table = Table("way", title=result["setting"])
    for column in ("step, s", "sampling", "update", "rewards", "waited for", "hidden", "bound", "hidden by step"):
        table.add_column(column, justify="right")
    for way in result["ways"]:
        mean = way["mean"]
        cells = [f"{mean[name]:.2f}" for name in ("step", "sampling", "update", "rewards", "waited", "hidden", "bound")]
        table.add_row(way["way"], *cells, " ".join(f"{step['hidden']:.2f}" for step in way["steps"]))
    console.print(table)
    for way in result["ways"][1:]:
        console.print(way["way"], *way["line"], sep="\n", highlight=False, soft_wrap=True)
    trajectories = {tuple(step["reward"] for step in way["steps"]) for way in result["ways"] if way["way"] != AHEAD}
    console.print(f"one trajectory in the other ways: {'yes' if len(trajectories) == 1 else 'NO'}")


if __name__ == "__main__":
    main()
