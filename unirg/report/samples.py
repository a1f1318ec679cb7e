"""Sample films with their reports, kept in the run folder for the report page."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unirg.prompt import report_text
from unirg.run import write_atomically
from unirg.study import Study

LARGEST = 512
"""Films are shrunk to at most so many pixels a side."""


def write_samples(
    run: Path,
    studies: Sequence[Study],
    predictions: Mapping[str, Mapping[str, str]],
    *,
    split: str = "test",
    count: int = 8,
    seed: int = 0,
) -> Path:
    """Writes films of `count` studies as PNG, and samples.json with their reports, under RUN/samples.

    The studies are picked at random by `seed`, never by how well they went. `predictions` maps an arm to its reports by
    study id. Samples of other splits stay. Raises OSError naming a film that cannot be read.
    """
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    picked = np.random.default_rng(seed).permutation(len(studies))[:count]
    rows: list[dict[str, Any]] = []
    for index in sorted(int(i) for i in picked):
        study = studies[index]
        image = None
        if study.images:
            film = study.images[0].load()
            film.thumbnail((LARGEST, LARGEST))
            image = f"{re.sub(r'[^A-Za-z0-9_-]', '_', split)}-{index:06d}.png"
            film.save(folder / image)
        rows.append(
            {
                "id": study.id,
                "split": split,
                "image": image,
                "film": study.extra.get("film"),
                "reference": report_text(study),
                "complete": study.extra.get("complete"),
                "labels": dict(study.labels),
                "reports": {arm: reports[study.id] for arm, reports in predictions.items() if study.id in reports},
            }
        )
    path = folder / "samples.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    others = [row for row in kept if row["split"] != split]
    write_atomically(path, json.dumps([*others, *rows], indent=1, ensure_ascii=False) + "\n")
    return path
