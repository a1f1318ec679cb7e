"""A reward that is a function."""

from typing import Any


def words_near(
    candidates: list[str], references: list[str], *, tolerance: int = 5, **columns: Any
) -> list[float | None]:
    """Whether the report has about as many words as the reference."""
    return [
        float(abs(len(candidate.split()) - len(reference.split())) <= tolerance) if reference.strip() else None
        for candidate, reference in zip(candidates, references, strict=True)
    ]
