"""GREEN: its formula, upstream's lenient reading, a strict one, and the prompt from a file."""

import functools
import json

import pytest

from tests.judge_server import CANDIDATE, REFERENCE, scores_of, serve
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward
from unirg_rewards import judge
from unirg_rewards.green import official_counts, strict_counts

PROMPT = "Compare them. Reference: {reference} Candidate: {candidate} List errors (a) to (f) and what matches."
NAMES = ("False", "Missing", "Place", "Severity", "Added comparison", "Omitted comparison")


def _lines(*numbers):
    return "\n".join(f"({letter}) {name}: {n}. Something" for letter, name, n in zip("abcdef", NAMES, numbers))


def _answer(matched, *errors, insignificant=(0, 0, 0, 0, 0, 0)):
    return (
        f"[Explanation]:\nOne thing is left out.\n\n[Clinically Significant Errors]:\n{_lines(*errors)}\n\n"
        f"[Clinically Insignificant Errors]:\n{_lines(*insignificant)}\n\n[Matched Findings]:\n{matched}. No effusion"
    )


WHOLE = {
    "all six": (_answer(2, 1, 0, 2, 0, 0, 1), [2, 1, 0, 2, 0, 0, 1]),
    "insignificant ones do not count": (_answer(2, 0, 0, 0, 0, 0, 0, insignificant=(9, 9)), [2] + [0] * 6),
    "some left out": (_answer(1, 0, 3), [1, 0, 3, 0, 0, 0, 0]),
    "nothing matched": (_answer(0, 1), [0, 1, 0, 0, 0, 0, 0]),
    "none": (_answer(1).replace("Errors]:\n\n", "Errors]:\nNone.\n\n"), [1] + [0] * 6),
    "no errors": (_answer(4).replace("Errors]:\n\n", "Errors]:\nNo errors were found.\n\n"), [4] + [0] * 6),
    "end of sequence": (_answer(3, 1) + "</s>", [3, 1, 0, 0, 0, 0, 0]),
    "no explanation": (_answer(3, 1).partition("\n\n")[2], [3, 1, 0, 0, 0, 0, 0]),
    "number after a number": (
        _answer(3).replace("Errors]:\n\n", "Errors]:\n(c) Place: 1. T: 7. Rib\n\n"),
        [3, 0, 0, 1] + [0] * 3,
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_both_parsers_read_a_whole_answer_alike(name):
    text, expected = WHOLE[name]
    assert strict_counts(text) == expected
    assert official_counts(text) == expected


def _without(text, part):
    assert part in text
    return text.replace(part, "")


FIVE = _answer(5, 1, 2)
BROKEN = {  # answer -> what upstream makes of it, as it was found by running upstream
    "no section of significant errors": (FIVE.replace("Significant Errors", "Other"), [5] + [0] * 6),
    "a number without full stop": (FIVE.replace("(a) False: 1. Something", "(a) False: 1"), [5, 0, 2, 0, 0, 0, 0]),
    "a blank line inside": (FIVE.replace("\n(b) Missing: 2", "\n\n(b) Missing: 2", 1), [5, 1, 0, 0, 0, 0, 0]),
    "garbage": ("I cannot help with that.", [0] * 7),
    "empty": ("", [0] * 7),
    "cut before the matched findings": (FIVE.partition("[Matched")[0], [0, 1, 2, 0, 0, 0, 0]),
    "cut inside the errors": (FIVE.partition("(b) Missing")[0], [0, 1, 0, 0, 0, 0, 0]),
    "matched findings without a number": (FIVE.replace("5. No effusion", "Effusion, 5."), [0, 1, 2, 0, 0, 0, 0]),
    "numbers for letters": (FIVE.replace("(a)", "(1)").replace("(b)", "(2)"), [5, 1, 2, 0, 0, 0, 0]),
    "a letter twice": (FIVE.replace("(b) Missing: 2", "(a) Missing: 2", 1), [5, 2, 0, 0, 0, 0, 0]),
    "errors in words": (FIVE.replace("(b) Missing: 2. Something", "(b) Missing: two.", 1), [5, 1, 0, 0, 0, 0, 0]),
    "sections twice": (f"{FIVE}\n\n{_answer(1)}".replace("[Explanation]:", "", 2), [5, 1, 2, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_a_number_upstream_and_none_here(name):
    text, upstream = BROKEN[name]
    assert official_counts(text) == upstream
    if name == "a blank line inside":
        assert strict_counts(text) == [5, 1, 2, 0, 0, 0, 0]  # nothing is missing, so it is read whole
    else:
        assert strict_counts(text) is None


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.001)


def _green(folder, server, **options):
    (folder / "prompt.txt").write_text(PROMPT)
    settings = {"base_url": server.base_url, "model": "g", "cache": str(folder / "c.sqlite")}
    return load_reward("green", settings | {"prompt": str(folder / "prompt.txt")} | options)


@pytest.fixture
def green(tmp_path):
    return functools.partial(_green, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(_answer(1, 0, 2, 1, 0, 0, 1), 1 / 5), (_answer(2, 0, 0, 0, 0, 0, 0), 1.0), (_answer(0, 0, 0, 0, 0, 0, 0), 0.0)],
)
def test_the_score_is_matched_over_matched_and_significant(green, text, expected):
    with serve(text) as server:
        assert scores_of(green(server)) == [expected]


def test_a_broken_answer_masks_and_the_official_parser_scores_it(green):
    with serve("[Matched Findings]:\n3. All") as server:
        with pytest.warns(RuntimeWarning, match="malformed"):
            assert scores_of(green(server, attempts=2)) == [None]
        assert scores_of(green(server, parser="official")) == [1.0]


def test_the_prompt_is_the_files_with_both_texts_cut_to_300_words(green):
    long = " ".join(f"w{i}" for i in range(400))
    with serve(_answer(1, 0)) as server:
        green(server).score([long], ["Uses {candidate} and <|user|>.  Two  blanks."])
        [message] = server.bodies[0]["messages"]
    cut = " ".join(f"w{i}" for i in range(300))
    filled = PROMPT.format(reference="Uses {candidate} and < |user|>. Two blanks.", candidate=cut)
    assert message == {"role": "user", "content": filled}


def test_another_prompt_or_parser_is_another_cache_entry_and_identity(green, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(PROMPT + " Be brief.")
    with serve(_answer(1, 0)) as server:
        rewards = [green(server), green(server, parser="official"), green(server, prompt=str(other)), green(server)]
        for reward in rewards:
            reward.score([CANDIDATE], [REFERENCE])
        assert len(server.bodies) == 3
    assert len({json.dumps(reward.written.identity) for reward in rewards}) == 3


@pytest.mark.parametrize("text", ["", "{reference}", "{reference} {candidate} {candidate}"])
def test_a_prompt_without_its_places_is_refused(green, tmp_path, text):
    (tmp_path / "bad.txt").write_text(text)
    with serve("") as server, pytest.raises(RewardError, match=r"bad\.txt"):
        green(server, prompt=str(tmp_path / "bad.txt"))


def test_a_missing_prompt_is_named(green, tmp_path):
    with serve("") as server, pytest.raises(RewardError, match=r"absent\.txt"):
        green(server, prompt=str(tmp_path / "absent.txt"))
