"""`unirg data`: read every study once before training time is spent on it."""

import base64
import difflib
import html
import io
import os
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unirg import watchdog
from unirg.data import JsonlData, OpeniData, PhantomData, drawn_films, load_studies
from unirg.data.jsonl import FIELDS, read_studies
from unirg.data.openi import fetch_reports
from unirg.errors import UserError
from unirg.extraction import FINDINGS, extract
from unirg.prompt import PromptConfig, build_messages, report_text
from unirg.study import Study, StudyImage

_SHOWN = 12
_ROWS = 20
_SPLITS = {"phantom": ("train", "dev", "test", "unseen"), "openi": ("train", "dev", "test")}


@dataclass(frozen=True)
class Problem:
    """What keeps a study (by id) from being trained on."""

    study: str
    what: str


def images_of(study: Study) -> tuple[StudyImage, ...]:
    """The study's images and its prior study's."""
    return (*study.images, *(study.prior.images if study.prior else ()))


def broken_films(images: Iterable[StudyImage]) -> dict[Path, str]:
    """Reads images, several at a time, and says what is wrong with which file. Drawn films are drawn, which takes a
    millisecond."""
    threads = max(4, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    broken: dict[Path, str] = {}
    waiting: deque[Future[dict[Path, str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:  # decoding leaves the interpreter to others
        for image in images:
            watchdog.goes_on()
            waiting.append(pool.submit(_broken, image))
            if len(waiting) > 4 * threads:  # few: a signal waits for them
                broken |= waiting.popleft().result()
        for last in waiting:
            broken |= last.result()
    return broken


def _broken(image: StudyImage) -> dict[Path, str]:
    try:
        image.load()
    except OSError as error:
        assert isinstance(image.source, Path)  # what is drawn is of no file
        missing = isinstance(error, FileNotFoundError)
        return {image.source: f"missing image {image.source}" if missing else f"corrupt image: {error}"}
    return {}


def check_studies(studies: Sequence[Study], broken: Mapping[Path, str] | None = None) -> list[Problem]:
    """Names every study with a missing or corrupt image, no report or a repeated id. `broken` has the files of which
    something is known to be wrong, and what; without it all are read."""
    images = (image for study in studies for image in images_of(study) if isinstance(image.source, Path))
    broken = broken_films(images) if broken is None else broken
    problems: list[Problem] = []
    seen: Counter[str] = Counter()
    for study in studies:
        seen[study.id] += 1
        if seen[study.id] == 2:
            problems.append(Problem(study.id, "the id occurs more than once; ids must be unique"))
        if not report_text(study):
            problems.append(Problem(study.id, "empty report: neither findings nor impression"))
        sources = [image.source for image in images_of(study) if isinstance(image.source, Path)]
        problems += [Problem(study.id, broken[source]) for source in sources if source in broken]
    return problems


def check(source: Path, overrides: Sequence[str] = (), splits: Sequence[str] | None = None) -> int:
    """Check a recipe's data, or a .jsonl or .csv file of studies: counts, examples, every bad row by name.

    `overrides` are a recipe's ("data.images=/path"); with a file, the keys of the jsonl adapter
    ("data.columns.id=uid"). Returns 0 when all is well and 1 where a study is bad; raises UserError for what cannot be
    read at all.
    """
    config, prompt = _config(source, overrides)
    there = tuple(config.files) if isinstance(config, JsonlData) else _SPLITS[config.adapter]
    console = Console()
    bad: list[str] = []
    notes: list[str] = []
    cards: list[str] = []
    for split in splits or there:
        rows: list[str] = []
        if isinstance(config, JsonlData):
            studies, rows, unused = read_studies(config, split)
            if unused:
                notes.append(f"{split}: columns not used: {', '.join(map(_field_like, unused))}")
        else:
            studies = load_studies(config, split)
        watched = track(studies, f"reading {split}", console=console, transient=True)
        broken = broken_films(image for study in watched for image in images_of(study))
        rows += [f"study {problem.study}: {problem.what}" for problem in check_studies(studies, broken)]
        _print_summary(console, split, studies)
        labels = dict.fromkeys(key.partition("/")[0] for study in studies for key in study.labels)
        if strange := [_finding_like(name) for name in labels if name not in FINDINGS]:
            notes.append(f"{split}: labels that only a reward of your own could use: {', '.join(strange)}")
        bad += [f"{split}: {row}" for row in rows]
        unreadable = {row.split(": ")[0].removeprefix("study ") for row in rows}
        good = [study for study in studies if study.id not in unreadable]
        cards += [_card(split, study, prompt) for study in good[:: max(1, len(good) // _SHOWN)][:_SHOWN]]
        for study in good[:2]:
            _print_study(console, study, prompt)
    if drawn_films(config):
        console.print("The films are drawn, not radiographs.")
    page = Path("runs") / "data-check" / f"{source.stem}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_PAGE.format(title=html.escape(str(source)), cards="\n".join(cards)), encoding="utf-8")
    console.print(f"studies in words and pictures: {page}", soft_wrap=True, highlight=False, markup=False)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False, style="yellow")
    for row in bad[:_ROWS]:
        console.print(row, soft_wrap=True, highlight=False, markup=False, style="red")
    if len(bad) > _ROWS:
        console.print(f"... and {len(bad) - _ROWS} more")
    console.print(f"{len(bad)} problem{'s' * (len(bad) != 1)}" if bad else "no problems")
    return 1 if bad else 0


def fetch(name: Literal["openi"], folder: Path | None = None) -> int:
    """Download a public data set's reports to where its adapter looks for them, and print the path."""
    print(fetch_reports(folder) if folder else fetch_reports())
    return 0


def _config(source: Path, overrides: Sequence[str]) -> tuple[PhantomData | OpeniData | JsonlData, PromptConfig]:
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected a recipe (.yaml), or studies in .jsonl or .csv")
    if source.suffix.lower() in (".yaml", ".yml"):
        from unirg.recipe.load import load_recipe

        recipe = load_recipe(source, overrides)
        return recipe.data, recipe.prompt
    if source.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"{source}: expected a recipe (.yaml), or studies in .jsonl or .csv")
    given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    settings = given.pop("data", {}) if isinstance(given, dict) else {}
    if given or not isinstance(settings, dict):
        raise UserError(f"overrides {' '.join(overrides)}: of a file of studies these are data.KEY=VALUE")
    try:
        return JsonlData.model_validate({**settings, "files": {"all": source}}), PromptConfig()
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            said = detail["msg"]
            if detail["type"] == "extra_forbidden":
                said = f"unknown key; expected {', '.join(JsonlData.model_fields)}"
            lines.append(f"override data.{'.'.join(map(str, detail['loc']))}: {said}")
        raise UserError("\n".join(lines)) from error


def _print_summary(console: Console, split: str, studies: Sequence[Study]) -> None:
    """Counts of a split: studies, images, sections, lengths, labels."""
    images = Counter(len(study.images) for study in studies)
    sections = Counter(bool(study.findings) + 2 * bool(study.impression) for study in studies)
    lengths = sorted(len(report_text(study).split()) for study in studies) or [0]
    table = Table("", split, show_edge=False)
    table.add_row("studies", str(len(studies)))
    table.add_row("patients", str(len({study.patient for study in studies if study.patient}) or "not told"))
    table.add_row("images per study", ", ".join(f"{count}: {number}" for count, number in sorted(images.items())))
    names = ("neither section", "findings only", "impression only", "both sections")
    for index, name in enumerate(names):
        table.add_row(name, str(sections[index]))
    table.add_row("with a prior", str(sum(study.prior is not None for study in studies)))
    middle, mean = statistics.median(lengths), statistics.fmean(lengths)
    table.add_row("words per report", f"median {middle:.0f}, mean {mean:.1f}, longest {lengths[-1]}")
    known: Counter[str] = Counter()
    present: Counter[str] = Counter()
    for study in studies:
        known.update(name for name in study.labels if "/" not in name)
        present.update(name for name, value in study.labels.items() if value == 1 and "/" not in name)
    for name, count in sorted(known.items(), key=lambda item: -present[item[0]]):
        table.add_row(name, f"{present[name]} of {count} ({present[name] / count:.1%})")
    console.print(table)


def _print_study(console: Console, study: Study, prompt: PromptConfig) -> None:
    text = build_messages(study, prompt)[0]["content"][-1]["text"]
    for name, words in (
        ("study", study.id),
        ("prompt", text),
        ("report", report_text(study)),
        ("labels", _found(study)),
    ):
        console.print(f"{name:>7}: {words}", soft_wrap=True, highlight=False, markup=False)
    console.print()


def _field_like(column: str) -> str:
    """The column's name, with the field that it may have been meant for."""
    near = difflib.get_close_matches(column.lower(), FIELDS, n=1, cutoff=0.7)
    return f"{column} (did you mean {near[0]}?)" if near else column


def _finding_like(label: str) -> str:
    """The label's name, with the finding that the reader takes it for."""
    read = [mention.finding for mention in extract(label.replace("_", " ")) if mention.polarity == "positive"]
    return f"{label} (did you mean {read[0]}?)" if read else label


def _found(study: Study) -> str:
    if not study.labels:
        return "unknown"
    return ", ".join(name for name, value in sorted(study.labels.items()) if value == 1) or "no finding"


_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.4 system-ui; margin: 2em auto; max-width: 60em }} article {{ display: flex; gap: 1em;
border-top: 1px solid #ccc; padding: 1em 0 }} img {{ height: 256px; image-rendering: auto }} b {{ color: #555 }}
</style><h1>{title}</h1>
{cards}
"""


def _card(split: str, study: Study, prompt: PromptConfig) -> str:
    """One study as a piece of the page: its images beside prompt, report and labels."""
    pictures = []
    for image in study.images:
        picture = image.load()
        picture.thumbnail((512, 512))
        with io.BytesIO() as file:
            picture.save(file, format="PNG")
            data = base64.b64encode(file.getvalue()).decode()
        pictures.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(image.view or "image")}">')
    if study.extra.get("film") == "drawn":
        pictures.append("<small>drawn film</small>")
    text = build_messages(study, prompt)[0]["content"][-1]["text"]
    lines = (
        ("study", f"{split} {study.id}"),
        ("prompt", text),
        ("report", report_text(study)),
        ("labels", _found(study)),
    )
    words = "".join(f"<p><b>{name}</b> {html.escape(line)}</p>" for name, line in lines)
    return f"<article><div>{''.join(pictures)}</div><div>{words}</div></article>"
