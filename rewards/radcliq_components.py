"""The components of RadCliQ and of UniRG's R1, each in the form that RadCliQ was fitted with.

RadGraph F1: the mean of entity and relation F1, by the first RadGraph model, capitals told apart. BERTScore:
distilroberta-base, layer 5, rescaled, without idf (as in the reference implementation's configuration), runs of blanks
joined. SembScore: the cosine of CheXbert's vectors. BLEU-2: smoothed, full stops split off.
"""

import re
from collections.abc import Mapping
from typing import Any

from .bertscore import BertScore
from .bleu import Bleu
from .radgraph_f1 import RadGraphF1
from .semb_score import SembScore
from .text_encoder import SHARES

RADGRAPH = {"level": "combined", "model": "radgraph", "case": "pypi"}
NEEDS = "the weights of RadGraph, CheXbert and distilroberta-base, by `model_folder` in each component's options"


class Components:
    """The four metrics, built from the options given for each (over RADGRAPH for the first)."""

    def __init__(
        self,
        radgraph: Mapping[str, Any] | None = None,
        bertscore: Mapping[str, Any] | None = None,
        chexbert: Mapping[str, Any] | None = None,
    ) -> None:
        self.radgraph = RadGraphF1(**{**RADGRAPH, **(radgraph or {})})
        self.bertscore = BertScore(**(bertscore or {}))
        self.semb_score = SembScore(**(chexbert or {}))
        self.bleu = Bleu("rexrank")

    @property
    def shares(self) -> tuple[str, ...]:
        """Whom they share a process with: other rewards of the same RadGraph model, and those of the text encoders."""
        return (self.radgraph.shares, SHARES)

    def setup(self, device: str = "cpu") -> None:
        """Load the three models."""
        for metric in (self.radgraph, self.bertscore, self.semb_score):
            metric.setup(device)

    @property
    def identity(self) -> dict[str, Any]:
        """Each component's identity under its name."""
        names = ("radgraph", "bertscore", "semb_score", "bleu")
        return {name: getattr(self, name).identity for name in names}

    def prepare(self, references: list[str]) -> None:
        """Let the three models read references, which they remember."""
        self.radgraph.prepare(references)
        self.bertscore.prepare(_joined(references))
        self.semb_score.prepare(references)

    def values(self, candidates: list[str], references: list[str]) -> list[dict[str, float] | None]:
        """By component's name, the values of each pair; None where one of them cannot judge it."""
        stated, wanted = _joined(candidates), _joined(references)
        columns = {
            "radgraph": self.radgraph.score(candidates, references),
            "bertscore": self.bertscore.score(stated, wanted),
            "semb_score": self.semb_score.score(candidates, references),
            "bleu": self.bleu.score(candidates, references),
        }
        rows: list[dict[str, float] | None] = []
        for values in zip(*columns.values(), strict=True):
            judged = [value for value in values if value is not None]
            rows.append(dict(zip(columns, judged, strict=True)) if len(judged) == len(columns) else None)
        return rows


def _joined(texts: list[str]) -> list[str]:
    """With runs of blanks joined."""
    return [re.sub(" +", " ", text) for text in texts]
