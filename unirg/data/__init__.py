"""Data: one adapter a file, each giving the studies of a split."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, assert_never

from pydantic import Field

from unirg.data.jsonl import JsonlData, load_jsonl
from unirg.data.openi import OpeniData, load_openi
from unirg.data.phantom import PhantomData, load_phantom
from unirg.prompt import report_text
from unirg.study import Study

__all__ = [
    "DataConfig",
    "JsonlData",
    "OpeniData",
    "PhantomData",
    "drawn_films",
    "fingerprint",
    "load_studies",
]

DataConfig = Annotated[PhantomData | OpeniData | JsonlData, Field(discriminator="adapter")]
"""The `data` part of a recipe: which adapter, and its settings."""


def load_studies(config: PhantomData | OpeniData | JsonlData, split: str) -> list[Study]:
    """The studies of a split ("train", "dev", "test"; phantom data also "unseen"), in a fixed order.

    Raises UserError (unknown split, missing files, bad rows), naming what was expected and where.
    """
    match config:
        case PhantomData():
            return load_phantom(config, split)
        case OpeniData():
            return load_openi(config, split)
        case JsonlData():
            return load_jsonl(config, split)
        case _:
            assert_never(config)


def drawn_films(config: PhantomData | OpeniData | JsonlData) -> bool:
    """Whether the films are drawings, not radiographs: to be said wherever results are shown."""
    return isinstance(config, PhantomData) or (isinstance(config, OpeniData) and config.images is None)


def fingerprint(studies: Sequence[Study]) -> str:
    """SHA-256 (hex) over the studies' ids, contexts, reports, complete reports and labels, in order.

    Two runs with one fingerprint learned from the same texts and labels; image contents are not read.
    """
    digest = hashlib.sha256()
    for study in studies:
        row = [
            *(study.id, study.institution, study.indication, study.comparison, study.technique, report_text(study)),
            sorted(study.demographics.items()),
            *(study.extra.get("complete"), sorted(study.labels.items())),
            *([] if study.prior is None else [report_text(study.prior)]),
        ]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
