"""What is said of ranks, and the restarts that could not work."""

import pytest

from unirg import ranks
from unirg.errors import UserError


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([4, 2], "ranks 2, 4"), ([7, 6], "ranks 6-7")],
)
def test_ranks_in_words(numbers: list[int], words: str) -> None:
    assert ranks.numbers(numbers) == words


@pytest.mark.parametrize(
    ("shared", "restarts", "refused"), [("True", 2, True), ("True", 0, False), ("False", 2, False)]
)
def test_restarts_over_a_shared_store_are_refused(
    monkeypatch: pytest.MonkeyPatch, shared: str, restarts: int, refused: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    if refused:
        with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            ranks.check_restarts()
    else:
        ranks.check_restarts()


def test_one_process_waits_for_none() -> None:
    assert ranks.largest(7) == 7 and ranks.everyones("a") == ["a"]
