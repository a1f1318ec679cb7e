"""BLEU of a report against the reference: n-gram overlap, in the variants that leaderboards use.

They differ by an order of magnitude on the same pair, so a figure means something only with its variant:

- `rexrank`: BLEU-2 per report with smoothing method 1 (Chen & Cherry 2014: a zero count becomes 0.1), lower case, the
  full stop a token of its own, split on blanks. What ReXrank and RadCliQ compute (fast_bleu 0.0.90). The default: it
  is dense, lies in [0, 1], and is compared on a public leaderboard.
- `coco1` ... `coco4`: pycocoevalcap's BLEU-n arithmetic per report (tiny 1e-15, small 1e-9), case kept, split on
  white space. What RadEval prints is the corpus form of it, `corpus_bleu`.
- `sentence4`: BLEU-4 with add-one smoothing of orders 2 to 4 (Lin & Och 2004), lower case, words and punctuation marks
  as tokens. Smooth enough to train on, and 1 for an exact match however short.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

VARIANTS = ("rexrank", "coco1", "coco2", "coco3", "coco4", "sentence4")


class Bleu:
    """n-gram overlap with the reference report, BLEU-2 as on ReXrank unless another variant is named.

    Lies in [0, 1]; an empty candidate scores 0, and a study without a reference report is masked.
    """

    needs = "nothing"

    def __init__(self, variant: str = "rexrank") -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant '{variant}' is none of {', '.join(VARIANTS)}")
        self.variant = variant

    @property
    def identity(self) -> dict[str, Any]:
        """The variant, which decides the scale."""
        return {"metric": "BLEU", "variant": self.variant}

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        return [self._pair(*pair) for pair in zip(candidates, references, strict=True)]

    def _pair(self, candidate: str, reference: str) -> float | None:
        if not reference.strip():
            return None
        if self.variant.startswith("coco"):
            return corpus_bleu([candidate], [reference], order=int(self.variant[-1]))
        if self.variant == "rexrank":
            return _smoothed(_rexrank_tokens(candidate), _rexrank_tokens(reference), 2, add_one=False)
        return _smoothed(_words(candidate), _words(reference), 4, add_one=True)


def corpus_bleu(candidates: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """BLEU-`order` of a whole corpus by pycocoevalcap's arithmetic, one reference each, split on white space."""
    tiny, small = 1e-15, 1e-9
    matches, totals = [0] * order, [0] * order
    candidate_length = reference_length = 0
    for candidate, reference in zip(candidates, references, strict=True):
        tokens, targets = tuple(candidate.split()), tuple(reference.split())
        candidate_length += len(tokens)
        reference_length += len(targets)
        for n, (match, total) in enumerate(_matches(tokens, targets, order)):
            matches[n] += match
            totals[n] += total
    product = math.prod((match + tiny) / (total + small) for match, total in zip(matches, totals, strict=True))
    ratio = (candidate_length + tiny) / (reference_length + small)
    return product ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _smoothed(candidate: tuple[str, ...], reference: tuple[str, ...], order: int, *, add_one: bool) -> float:
    """Sentence BLEU: `add_one` to both counts of orders 2 and up, or 0.1 for a count of zero. 0 without a unigram in
    common."""
    counts = _matches(candidate, reference, order)
    if counts[0][0] == 0:
        return 0.0
    logs = 0.0
    for n, (match, total) in enumerate(counts):
        if add_one and n > 0:
            logs += math.log((match + 1) / (total + 1))
        else:
            logs += math.log((match or 0.1) / max(1, total))
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(logs / order + brevity)


def _matches(candidate: tuple[str, ...], reference: tuple[str, ...], order: int) -> list[tuple[int, int]]:
    """(n-grams of the candidate found in the reference, clipped; n-grams of the candidate) for n = 1 .. order."""
    targets = _ngrams(reference, order)
    found = []
    for n in range(1, order + 1):
        grams = Counter(zip(*(candidate[start:] for start in range(n)), strict=False))
        matched = sum(min(count, targets.get(gram, 0)) for gram, count in grams.items())
        found.append((matched, max(0, len(candidate) - n + 1)))
    return found


@lru_cache(maxsize=4096)
def _ngrams(tokens: tuple[str, ...], order: int) -> dict[tuple[str, ...], int]:
    """Counts of all n-grams up to `order`. A reference is met once per candidate of its group, hence the cache."""
    return Counter(gram for n in range(1, order + 1) for gram in zip(*(tokens[i:] for i in range(n)), strict=False))


def _rexrank_tokens(text: str) -> tuple[str, ...]:
    return tuple(token for token in text.lower().replace(".", " .").split(" ") if token)


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+|[^\w\s]", text.lower()))
