"""METEOR 1.5 (Denkowski & Lavie 2014): words matched by form, stem, synonym and paraphrase, by its own Java program.

The pycocoevalcap package brings the program with its paraphrase table, and this runs it (English, normalised, on one
reference), so that the figure is the one that tables of generated reports print. NLTK's `meteor_score` bears the name
and is another metric: no paraphrases, other parameters.

For evaluation only. It holds a Java process with a heap of 2 GB and answers pair by pair over a pipe, and it pays for
overlap of words that a negation does not change.
"""

import shutil
from importlib.metadata import version
from typing import Any

from unirg.scoring.contract import RewardError


class Meteor:
    """METEOR 1.5 against the reference, by pycocoevalcap's Java program; for evaluation only.

    Lies in [0, 1]. An empty candidate scores 0; a study with a blank reference is masked.
    """

    needs = "pip install pycocoevalcap, and Java with 2 GB of memory"
    evaluation_only = "it holds a Java process, and pays for overlap of words that a negation does not change"

    def __init__(self) -> None:
        self._program: Any = None

    def setup(self) -> None:
        """Start the program. Raises RewardError saying what to install."""
        if self._program is not None:
            return
        try:
            from pycocoevalcap.meteor.meteor import Meteor as Program
        except ImportError as error:
            raise RewardError("meteor runs pycocoevalcap's METEOR 1.5: pip install pycocoevalcap") from error
        if shutil.which("java") is None:
            raise RewardError("meteor runs a Java program, and there is no `java` on the path; install a Java runtime")
        self._program = Program()

    @property
    def identity(self) -> dict[str, Any]:
        """The program, and once started the package that brought it."""
        named = {"metric": "METEOR 1.5", "language": "en"}
        return named | ({"pycocoevalcap": version("pycocoevalcap")} if self._program is not None else {})

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        self.setup()
        pairs = [
            (_line(candidate), _line(reference)) for candidate, reference in zip(candidates, references, strict=True)
        ]
        asked = [pair for pair in dict.fromkeys(pairs) if all(pair)]
        answers: dict[tuple[str, str], float] = {}
        if asked:
            _, scores = self._program.compute_score(
                {number: [reference] for number, (_, reference) in enumerate(asked)},
                {number: [candidate] for number, (candidate, _) in enumerate(asked)},
            )
            answers = dict(zip(asked, map(float, scores), strict=True))
        return [(answers[pair] if pair[0] else 0.0) if pair[1] else None for pair in pairs]


def _line(text: str) -> str:
    """The report on one line and without the program's separator: both would shift every later answer."""
    return " ".join(text.replace("|||", " ").split())
