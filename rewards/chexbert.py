"""CheXbert F1: the observations that CheXbert reads in a report against those it reads in the reference.

Two figures bear this name, and neither is a mean of the other. The reward is the micro F1 of one report, 2 TP / (2 TP
+ FP + FN) over its classes, where 0/0 (nothing positive in either report, as on a normal study with five classes) is
1, and not the 0 that libraries give. What papers print is the F1 of a corpus, micro over all decisions, or macro, the
mean over classes, where a class that occurs on neither side counts 0: these are `corpus_terms`.

A policy can learn to play it: the labels say neither where, how severe, nor how many; and No Finding is one of the 14,
so that a normal template is right on every normal study.
"""

from collections.abc import Sequence
from typing import Any

from .chexbert_model import CLASSES, FIVE, NEEDS, POSITIVE, UNCERTAIN, CheXbert, Reading, load_chexbert
from .text_encoder import SHARES


class CheXbertF1:
    """CheXbert's observations in the report against those in the reference, micro F1 per report.

    Options: `classes` 14 (default) or 5; `uncertain` positive (default, as the f1chexbert package) or negative;
    `model_folder` and `bert`, see `load_chexbert`. Lies in [0, 1]. A candidate without a token scores 0; a study whose
    reference has none is masked.
    """

    needs = NEEDS
    shares = SHARES

    def __init__(
        self,
        classes: int = 14,
        uncertain: str = "positive",
        model_folder: str | None = None,
        bert: str | None = None,
    ) -> None:
        if classes not in (5, 14):
            raise ValueError(f"classes {classes} is neither 14 nor 5")
        if uncertain not in ("positive", "negative"):
            raise ValueError(f"uncertain '{uncertain}' is neither positive nor negative")
        self.classes, self.uncertain, self.model_folder, self.bert = classes, uncertain, model_folder, bert
        self._model: CheXbert | None = None

    def setup(self, device: str = "cpu") -> None:
        """Load CheXbert. Raises RewardError saying what is missing."""
        self._model = load_chexbert(self.model_folder, self.bert, device)

    @property
    def identity(self) -> dict[str, Any]:
        """Classes, how uncertainty counts, and once loaded the weights' fingerprint."""
        options = {"classes": self.classes, "uncertain": self.uncertain, "nothing positive": 1}
        return {"metric": "CheXbert micro F1 per report"} | options | weights_identity(self._model)

    def prepare(self, references: list[str]) -> None:
        """Read references, which the model remembers."""
        self._read(references)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        readings = self._read([*candidates, *references])
        chosen = FIVE if self.classes == 5 else range(len(CLASSES))
        scores: list[float | None] = []
        for candidate, reference in zip(readings[: len(candidates)], readings[len(candidates) :], strict=True):
            if reference.empty:
                scores.append(None)
            elif candidate.empty:
                scores.append(0.0)
            else:
                stated, wanted = self._positives(candidate), self._positives(reference)
                scores.append(report_f1([stated[index] for index in chosen], [wanted[index] for index in chosen]))
        return scores

    def corpus_terms(self, candidates: list[str], references: list[str], **columns: Any) -> dict[str, list[Any]]:
        """`micro_14`, `macro_14`, `micro_5` and `macro_5` of the corpus, whatever `classes` is, as the f1chexbert
        package reports them: blank reports are read like any other."""
        readings = [self._positives(reading) for reading in self._read([*candidates, *references])]
        return f1_terms(readings[: len(candidates)], readings[len(candidates) :])

    def _read(self, reports: list[str]) -> list[Reading]:
        if self._model is None:
            self.setup()
        assert self._model is not None
        return self._model.read(reports)

    def _positives(self, reading: Reading) -> list[bool]:
        counted = (POSITIVE, UNCERTAIN) if self.uncertain == "positive" else (POSITIVE,)
        return [state in counted for state in reading.states]


def report_f1(stated: Sequence[bool], wanted: Sequence[bool]) -> float:
    """Micro F1 of one report's classes; 1 where neither side has one."""
    total = sum(stated) + sum(wanted)
    return 2 * sum(a and b for a, b in zip(stated, wanted, strict=True)) / total if total else 1.0


def f1_terms(stated: Sequence[Sequence[bool]], wanted: Sequence[Sequence[bool]]) -> dict[str, list[Any]]:
    """2 TP and 2 TP + FP + FN of each report, over all classes (`micro_14`, `micro_5`) or of each (`macro_14`,
    `macro_5`). `stated` and `wanted` hold one row of 14 decisions per report, in the order of CLASSES."""
    terms: dict[str, list[Any]] = {}
    for name, chosen in (("14", range(len(CLASSES))), ("5", FIVE)):
        by_class = [
            [(2.0 * (said[index] and true[index]), float(said[index]) + true[index]) for index in chosen]
            for said, true in zip(stated, wanted, strict=True)
        ]
        terms[f"micro_{name}"] = [(sum(hits for hits, _ in row), sum(total for _, total in row)) for row in by_class]
        terms[f"macro_{name}"] = by_class
    return terms


def weights_identity(model: CheXbert | None) -> dict[str, Any]:
    """The loaded checkpoint's fingerprint, for a manifest; nothing before it is loaded."""
    return {"chexbert": model.encoder.weights} if model is not None else {}
