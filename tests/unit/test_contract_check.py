"""The contract check finds what is wrong with a reward, says it, and finds nothing wrong with one that is right."""

import re
from pathlib import Path

import pytest

from unirg.scoring.contract_check import check_contract
from unirg.scoring.registry import load_reward

RIGHT = '''
def good(candidates, references, *, worth=1.0, **columns):
    """Share of the reference's words that the report has."""
    scores = []
    for candidate, reference in zip(candidates, references):
        wanted = set(reference.lower().split())
        scores.append(worth * len(wanted & set(candidate.lower().split())) / len(wanted) if wanted else None)
    return scores
'''
# name -> (the reward's body, what is said of it)
WRONG = {
    "too_few": ("return good(candidates, references)[:-1]", "ordinary reports: .* returned 15 scores for 16"),
    "nan": (
        "return [float('nan') if not c.strip() else s for c, s in zip(candidates, good(candidates, references))]",
        "empty text as a report: .* returned nan at index 0",
    ),
    "text": ("return [str(s) for s in good(candidates, references)]", "returned '1.0' at index 0"),
    "silence_masked": (
        "return [s if c.strip() else None for c, s in zip(candidates, good(candidates, references))]",
        "an empty report is masked .None. where one is judged .study invented-1.",
    ),
    "ascii": (
        "[c.encode('ascii') for c in candidates]; return good(candidates, references)",
        "other scripts as a report",
    ),
    "short": ("[c.split(' ', 1)[1] for c in candidates]; return good(candidates, references)", "one word as a report"),
    "needs_reference": (
        "[r.split()[0] for r in references]; return good(candidates, references)",
        "without a reference",
    ),
    "needs_labels": (
        "[k.get('effusion') for k in columns['labels']]; return good(candidates, references)",
        "data without columns: KeyError: 'labels' .*needs_labels.py:.*name the columns you need",
    ),
    "needs_rows": (
        "best = max(map(len, candidates)); return good(candidates, references)",
        "an empty batch: ValueError",
    ),
    "random": ("import random; return [random.random() for _ in candidates]", "asked again, score otherwise"),
    "sorts": ("candidates.sort(); return good(candidates, references)", "changes its inputs: candidates"),
    "clears": (
        "[k.clear() for k in columns.get('labels', [])]; return good(candidates, references)",
        "changes its inputs: column 'labels'",
    ),
    "first_wins": (
        "return [s and (s + 1.0 * (i == 0)) for i, s in enumerate(good(candidates, references))]",
        "in another order of the batch, a report scores otherwise",
    ),
    "normalised": (
        "s = [x or 0.0 for x in good(candidates, references)]; m = max(s, default=0); return [x - m for x in s]",
        "alone, a report scores otherwise than among others",
    ),
    "rarity": (
        "return [1.0 / candidates.count(c) for c in candidates]",
        "reports that come twice in a batch score otherwise",
    ),
    "nine": (
        "assert len(candidates) != 9; return good(candidates, references)",
        "odd reports in one batch: AssertionError",
    ),
    "exits": ("raise SystemExit(3)", "ordinary reports: SystemExit: 3"),
}


@pytest.fixture
def check(tmp_path: Path):
    def run(source: str, name: str) -> list[tuple[str, str]]:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        return [(finding.kind, finding.text) for finding in check_contract(load_reward(f"{path}:{name}"))]

    return run


def wrong(findings: list[tuple[str, str]]) -> list[str]:
    return [text for kind, text in findings if kind == "wrong"]


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "label_f1", "entity_f1", "ratescore"])
def test_the_built_in_rewards_keep_the_contract(name: str) -> None:
    reward = load_reward(name)
    reward.setup()
    findings = check_contract(reward)
    assert [finding.text for finding in findings if finding.kind != "right"] == []
    assert len(findings) >= 12


@pytest.mark.parametrize("name", WRONG)
def test_a_breach_is_found_and_said(check, name: str) -> None:
    body, said = WRONG[name]
    source = RIGHT + f"\ndef {name}(candidates, references, **columns):\n    '''It.'''\n    {body}\n"
    found = wrong(check(source, name))
    assert any(re.search(said, text) for text in found), found


def test_a_right_reward_has_no_breach_and_its_masks_are_told(check) -> None:
    findings = check(RIGHT, "good")
    assert wrong(findings) == []
    assert ("right", "a study without a reference report is masked (None)") in findings
    assert findings[0][1].startswith("one finite number or None for each of 16 reports: ")


def test_one_that_compares_candidates_may_say_so(check) -> None:
    source = RIGHT + "\ndef rank(candidates, references, **columns):\n    '''It.'''\n    "
    source += "return [1.0 / candidates.count(c) for c in candidates]\n\nrank.deduplicate = False\n"
    findings = check(source, "rank")
    assert wrong(findings) == []
    assert any(kind == "note" and "deduplicate" in text for kind, text in findings)


def test_what_cannot_be_checked_or_looks_odd_is_noted(check) -> None:
    source = "def old(candidates, references, age):\n    return [None if a is None else a / 100 for a in age]\n"
    notes = [text for kind, text in check(source, "old") if kind == "note"]
    assert [text for text in notes if "needs 'age': a column of your own data" in text]
    assert [text for text in notes if "could judge none of 16" in text] and [
        text for text in notes if "docstring" in text
    ]
    source = "def brief(candidates, references):\n    '''It.'''\n    return [1 / (1 + len(c)) for c in candidates]\n"
    notes = [text for kind, text in check(source, "brief") if kind == "note"]
    assert [text for text in notes if text.startswith("an empty report scores 1 where the study's own scores 0.00")]
    source = "def flat(candidates, references):\n    '''It.'''\n    return [0.5] * len(candidates)\n"
    source += "\nflat.evaluation_only = 'it is flat'\n"
    notes = [text for kind, text in check(source, "flat") if kind == "note"]
    assert [text for text in notes if "no direction" in text] and [text for text in notes if "(it is flat)" in text]


def test_silence_is_tried_on_normal_studies_too(check) -> None:
    """No finding said where there is none: full marks, unless silence is seen for what it is."""
    source = "from unirg.extraction import is_normal\n\ndef normal(candidates, references):\n    '''It.'''\n"
    source += "    return [float(is_normal(c) == is_normal(r)) for c, r in zip(candidates, references)]\n"
    notes = [text for kind, text in check(source, "normal") if kind == "note"]
    assert [text for text in notes if "fall silent (study invented-4: The lungs are clear." in text]


def test_an_identity_that_no_manifest_can_keep(check) -> None:
    source = "class Odd:\n    '''It.'''\n    identity = {'model': object()}\n"
    source += "    def score(self, candidates, references):\n        return [float(len(c)) for c in candidates]\n"
    assert [text for text in wrong(check(source, "Odd")) if text.startswith("`identity` cannot be kept")]


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ("[(len(c), 9) for c in candidates]", "right", "has figures of a corpus: f1"),
        (
            "[(len(c), 9) for c in candidates if c.strip()]",
            "wrong",
            "corpus_terms 'f1' has 7 entries, expected a list of 9",
        ),
        ("[(1, len(c.encode('ascii'))) for c in candidates]", "wrong", "figures of a corpus: UnicodeEncodeError"),
        ("[(1, len(c) / len(candidates)) for c in candidates or 1]", "wrong", "figures of a corpus: TypeError"),
    ],
)
def test_figures_of_a_corpus_are_asked_for(check, rows: str, kind: str, said: str) -> None:
    source = "class Pooled:\n    '''It.'''\n"
    source += "    def score(self, candidates, references):\n        return [float(len(c)) for c in candidates]\n"
    source += f"    def corpus_terms(self, candidates, references):\n        return {{'f1': {rows}}}\n"
    assert [text for found, text in check(source, "Pooled") if found == kind and said in text]
