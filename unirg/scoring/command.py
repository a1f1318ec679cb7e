"""`unirg score` and `unirg rewards`: score two files of reports, and list what can score them."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from unirg.errors import UserError
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch, Terms, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.files import ReportFileError, read_references, read_reports
from unirg.scoring.registry import installed

BATCH = 256  # pairs scored at a time, so that a long file shows its first lines early


def score(
    references: Path, candidates: Path, rewards: str, *, as_json: bool = False, summary: bool = False, seed: int = 0
) -> int:
    """Print a score (null where a reward cannot judge) per study and reward, one line per study of the references.

    `rewards` is a list as `parse_rewards` reads it. With `as_json` a line is an object, otherwise tab-separated cells.
    `summary` adds the means, and the figures of the corpus that a reward has (`chexbert.micro_14`), with 95% bootstrap
    intervals over studies (`seed` draws them). Rewards get every column of
    the references, such as `labels`. Returns the exit status: 0, or 2 after one clear line on stderr where a file or a
    reward cannot be used.
    """
    try:
        engine = ScoringEngine(parse_rewards(rewards))
        (truths, studies), written = read_references(references), read_reports(candidates)
        _check_same_ids(references, truths, candidates, written)
        labels = list(engine.identities())
        if not as_json:
            print("\t".join(["id", *labels]))
        collected: dict[str, list[float | None]] = {label: [] for label in labels}
        terms: dict[str, list[Terms]] = {}
        ids = list(truths)
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            columns = study_columns([studies[name] for name in chunk])
            batch = ScoreBatch([written[name] for name in chunk], [truths[name] for name in chunk], columns)
            scores = engine.collect(engine.submit(batch))
            for row, name in enumerate(chunk):
                _print_line(name, {label: scores[label][row] for label in labels}, as_json)
            for label in labels:
                collected[label] += scores[label]
            for label, figures in engine.corpus_terms(batch).items() if summary else ():
                for figure, rows in figures.items():
                    terms.setdefault(f"{label}.{figure}", []).extend(rows)
        if summary:
            _print_summary(collected, terms, as_json, seed)
        for label, values in collected.items():
            if all(value is None for value in values):
                print(f"unirg score: reward '{label}' could judge none of the {len(values)} studies", file=sys.stderr)
    except UserError as error:
        print(f"unirg score: {error}", file=sys.stderr)
        return 2
    return 0


def parse_rewards(text: str) -> list[RewardConfig]:
    """The rewards of a comma list, each with its options in parentheses: `bleu(variant=coco4),entity_f1`.

    Values are read as YAML scalars (`sides=true`, `depth=2`). The whole item is the label where options are given.
    Raises RewardError where an item cannot be read.
    """
    configs = []
    for item in _split(text):
        name, bracket, rest = item.partition("(")
        if not name.strip() or (bracket and not rest.endswith(")")):
            raise RewardError(f"cannot read reward '{item}'; expected name or name(option=value,...)")
        options: dict[str, Any] = {}
        for pair in _split(rest[:-1]) if rest[:-1].strip() else []:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise RewardError(f"cannot read option '{pair}' of reward '{name}'; expected option=value")
            try:
                options[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise RewardError(f"cannot read option '{pair}' of reward '{name}'") from error
        configs.append(RewardConfig(name=name.strip(), label=item if options else None, options=options))
    return configs


def list_rewards(as_json: bool = False) -> int:
    """Print every installed reward: what it measures, what it needs, and the error of one that cannot be loaded."""
    for reward in installed():
        if as_json:
            print(json.dumps(asdict(reward)))
        elif reward.error:
            print(f"{reward.name} ({reward.package}): cannot be loaded: {reward.error}")
        else:
            print(f"{reward.name} ({reward.package}): {reward.measures}\n    needs: {reward.needs or 'not stated'}")
    return 0


def _split(text: str) -> list[str]:
    """`text` at its commas, those inside parentheses or brackets excepted."""
    items, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            items.append(text[start:index].strip())
            start = index + 1
    return [*items, text[start:].strip()]


def _check_same_ids(references: Path, truths: dict[str, str], candidates: Path, written: dict[str, str]) -> None:
    for path, missing in ((candidates, truths.keys() - written.keys()), (references, written.keys() - truths.keys())):
        if missing:
            shown = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
            other = references if path == candidates else candidates
            raise ReportFileError(f"{path}: lacks {len(missing)} of the studies of {other}: {shown}")


def _print_line(name: str, scores: dict[str, float | None], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"id": name} | scores))
    else:
        print("\t".join([name, *("" if value is None else f"{value:.4f}" for value in scores.values())]))


def _print_summary(
    collected: dict[str, list[float | None]], terms: dict[str, list[Terms]], as_json: bool, seed: int
) -> None:
    """Means, each followed by the reward's figures of the corpus."""
    from unirg.evaluation.intervals import corpus_statistic, intervals, mean_statistic

    statistics = {}
    for label, values in collected.items():
        statistics[label] = mean_statistic(values)
        statistics |= {key: corpus_statistic(rows) for key, rows in terms.items() if key.startswith(f"{label}.")}
    figures: dict[str, dict[str, Any]] = {}
    for (label, statistic), found in zip(statistics.items(), intervals(list(statistics.values()), seed=seed)):
        known = {key: None if math.isnan(value) else value for key, value in found._asdict().items()}
        figures[label] = known | {"judged": statistic.judged, "studies": len(statistic.numerator_N)}
    if as_json:
        print(json.dumps({"summary": figures}))
        return
    print(f"\n{'reward':<24} {'value':>8}   95% interval       judged")
    owner = ""
    for label, figure in figures.items():
        cells = ["-" if figure[key] is None else f"{figure[key]:.4f}" for key in ("mean", "low", "high")]
        owner = label if label in collected else owner
        shown = label if label == owner else f"  {label.removeprefix(owner)}"
        print(f"{shown:<24} {cells[0]:>8}   [{cells[1]}, {cells[2]}]   {figure['judged']}/{figure['studies']}")
