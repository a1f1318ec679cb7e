"""What a check says: one line about one thing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`fail` would stop or spoil a run, `warn` may, `ok` is what was looked at and is in order. `text` says what was
    found and, unless it is in order, what was expected and what to do."""

    area: str
    level: Literal["ok", "warn", "fail"]
    text: str
