"""Any metric of RadEval by name, `radeval:NAME`, where the radeval package is installed (Xu et al., EMNLP 2025 demo).

The figures are RadEval's, with its models and its choices. Its interface for one figure per report is
`compute(refs, hyps, per_sample=True)` of a metric, a list by key, of which a metric may have several. Around it, this
reward keeps the contract: blank reports never reach a metric (many fail on them), a list that is too short is asked for
again pair by pair, what is not finite is masked, and a distance (RadCliQ) is negated.
"""

import importlib
import math
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from unirg.scoring.contract import RewardError

needs = "the radeval package and the metric's own weights"

LOWER_IS_BETTER = ("radcliq",)
# What silence scores, where 0 is not the least a report can get. RadCliQ-v1 with no RadGraph overlap and both
# similarities at -1 is 5.1.
SILENCE = {"bertscore": -1.0, "radeval_bertscore": -1.0, "crimson": -1.0, "radcliq": -5.1}


def __getattr__(metric: str) -> type["RadEvalMetric"]:
    """The reward of the metric of that name: `radeval:bleu` is this module's `bleu`."""
    if metric.startswith("_"):
        raise AttributeError(metric)
    return type(metric, (RadEvalMetric,), {"metric": metric, "__doc__": f"RadEval's metric '{metric}'."})


class RadEvalMetric:
    """A metric of RadEval.

    Options: `key`, which of the metric's figures (an error lists them where there are several); `settings`, what the
    metric itself takes; `allow_remote`, needed by those that send reports to a company's endpoint.
    """

    metric = ""
    needs = needs

    def __init__(
        self, key: str | None = None, settings: dict[str, Any] | None = None, allow_remote: bool = False
    ) -> None:
        self.key, self.settings, self.allow_remote = key, settings or {}, allow_remote
        self._scorer: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Metric, key, sign and RadEval's version."""
        named = {"metric": f"RadEval {self.metric}", "key": self.key, "negated": self.metric in LOWER_IS_BETTER}
        return named | ({"radeval": version("radeval")} if self._scorer is not None else {})

    def setup(self) -> None:
        """Load the metric.

        Raises RewardError: the package is missing or does not load, it has no such metric, or the metric sends reports
        away without `allow_remote`.
        """
        if self._scorer is not None:
            return
        try:
            registry = importlib.import_module("radeval.metrics._registry")
        except ImportError as error:
            raise RewardError(
                f"radeval:{self.metric} needs the radeval package ({error}): pip install radeval"
            ) from error
        if self.metric not in registry.METRIC_REGISTRY:
            known = ", ".join(sorted(registry.METRIC_REGISTRY))
            raise RewardError(f"RadEval has no metric '{self.metric}'; it has: {known}")
        try:
            written = registry.get_metric_class(self.metric)
            if getattr(written, "is_api_based", False) and not self.allow_remote:
                raise RewardError(
                    f"radeval:{self.metric} may send every reference and candidate report to a language model of "
                    "RadEval's choice; set `allow_remote: true` where your data's terms permit that"
                )
            self._scorer = written(**self.settings)
        except ImportError as error:
            raise RewardError(f"radeval:{self.metric} cannot be loaded: {error}") from error

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """RadEval's figure per candidate; None where it is not finite, or the reference is blank."""
        self.setup()
        rows = [i for i, (c, r) in enumerate(zip(candidates, references, strict=True)) if c.strip() and r.strip()]
        figures = self._figures([references[i] for i in rows], [candidates[i] for i in rows]) if rows else []
        scores: list[float | None] = [SILENCE.get(self.metric, 0.0) if text.strip() else None for text in references]
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        for row, figure in zip(rows, figures, strict=True):
            scores[row] = None if figure is None or not math.isfinite(figure) else sign * float(figure)
        return scores

    def _figures(self, references: list[str], candidates: list[str]) -> list[float | None]:
        figures = self._chosen(self._scorer.compute(references, candidates, per_sample=True))
        if len(figures) == len(candidates):
            return figures
        if len(candidates) == 1:
            return [None]
        return [self._figures([r], [c])[0] for r, c in zip(references, candidates, strict=True)]

    def _chosen(self, computed: dict[str, Iterable[float | None]]) -> list[float | None]:
        key = next(iter(computed)) if self.key is None and len(computed) == 1 else self.key
        if key not in computed:
            asked = "give one as `key`" if key is None else f"'{key}' is none of them"
            raise RewardError(f"radeval:{self.metric} has the figures {', '.join(sorted(computed))}; {asked}")
        return list(computed[key])
