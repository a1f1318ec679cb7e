"""The offline reader of chest X-ray reports: findings with polarity, side, place, severity and span, and label sets."""

from .labels import is_normal, label_vector
from .lexicon import FINDINGS
from .mentions import Mention, extract

__all__ = ["FINDINGS", "Mention", "extract", "is_normal", "label_vector"]
