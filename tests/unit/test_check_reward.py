"""`unirg rewards check` and `new` as typed: what is said of a reward, and the exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from unirg.cli import main

FILE = '''
import re, time

def long(candidates, references):
    """Length."""
    return [min(len(text), 5000) / 5000 for text in candidates]

def breaks(candidates, references):
    """Fails on an empty report."""
    return [1 / len(text) for text in candidates]

def none(candidates, references, age):
    """Needs what generated studies have not."""
    return [a and a / 100 for a in age]

def hangs(candidates, references):
    """Never comes back."""
    while True:
        try:
            time.sleep(1000)
        except Exception:
            pass

def hangs_at_odd_texts(candidates, references):
    """A regular expression that takes longer than the world will last, at letters without a space."""
    return [float(re.match(r"(a+)+b", text) is None and len(text) > 0) for text in candidates]

def hangs_in_c(candidates, references):
    """Holds the interpreter's lock, and looks at no signal."""
    sum(range(10**15))

class Sleeps:
    """Hangs when it is set up."""

    def setup(self):
        time.sleep(1000)

    def score(self, candidates, references):
        return []

def exits(candidates, references):
    """Ends the process."""
    raise SystemExit(3)

class unbuilt:
    """No model either."""

    def __init__(self):
        raise RuntimeError("no weights")

    def score(self, candidates, references):
        return []

class Fails:
    """No model."""

    def setup(self):
        raise FileNotFoundError("model.pt")

    def score(self, candidates, references):
        return []
'''


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Exit status and output, its line breaks made spaces, of a check of one reward of FILE."""
    (tmp_path / "own.py").write_text(FILE)

    def check(name: str, *options: str) -> tuple[int, str]:
        status = main(["rewards", "check", f"{tmp_path}/own.py:{name}", *options])
        out, err = capsys.readouterr()
        return status, " ".join((out + err).split())

    return check


def test_a_reward_that_can_be_gamed_keeps_the_contract_and_is_told_what_it_teaches(said) -> None:
    status, text = said("long")
    assert status == 0 and "own.py:long keeps the contract." in text and "WRONG" not in text
    assert "harm pays. Best paid is 2,000 words (the report over and over, 2000 words), +" in text
    assert "It also pays for" in text and "findings spammed" in text.partition("It also pays for")[2]
    assert "they move the score: paraphrase." in text  # shuffled or in capitals a report is as long


def test_a_reward_that_cannot_be_gamed_so_is_told_what_is_cheapest(capsys) -> None:
    assert main(["rewards", "check", "entity_f1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no harmful change pays; the cheapest is sentence repeated" in text and "harm pays" not in text


def test_a_breach_is_status_1(said) -> None:
    status, text = said("breaks")
    assert status == 1
    assert (
        "WRONG empty text as a report: ZeroDivisionError: division by zero" in text
        and "own.py:10, in <listcomp>" in text
    )
    assert "breaks the contract: see the 2 marked WRONG." in text
    # The probes hold an empty report too.
    assert "What a policy would learn from it cannot be said: reward 'breaks' failed" in text


def test_one_that_exits_is_told_so(said) -> None:
    status, text = said("exits")
    assert status == 1 and "WRONG ordinary reports: SystemExit: 3" in text and "cannot be said: SystemExit: 3" in text


def test_one_that_hangs_is_told_so_and_where(said) -> None:
    status, text = said("hangs", "--timeout", "0.2")
    assert status == 1 and "WRONG ordinary reports: it hangs: a call with 16 reports had no end in 0.2 seconds" in text
    assert "own.py:20, in hangs); `--timeout` sets how long" in text
    assert "cannot be said: it hangs: scoring them had no end in 2 seconds" in text
    status, text = said("hangs_at_odd_texts", "--timeout", "0.5")
    assert status == 1 and "WRONG 10,000 letters without a space as a report: it hangs: a call with 1 reports" in text
    assert "in match)" in text and "one word 2,000 times as a report: it hangs" not in text
    status, text = said("Sleeps", "--timeout", "0.02")
    assert status == 2 and "it hangs: the set-up of '" in text and "in setup)" in text
    assert said("long", "--timeout", "0")[0] == 2


def test_one_that_holds_the_interpreter_is_ended_with_the_check(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FILE)
    program = "import sys; from unirg.scoring import check_reward as c; c.GRACE_SECONDS = 0.2\n"
    program += "sys.exit(c.check_reward('own.py:hangs_in_c', 0.2))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in hangs_in_c" in done.stderr


def test_own_columns_cannot_be_probed_here(said) -> None:
    status, text = said("none")
    assert status == 0 and "note needs 'age': a column of your own data" in text
    assert "cannot be said: reward" in text and "needs 'age'" in text


def test_what_cannot_be_loaded_or_set_up_is_bad_input(said, capsys) -> None:
    status, text = said("Fails")
    assert status == 2 and "own.py:Fails' cannot be set up: FileNotFoundError: model.pt (" in text
    status, text = said("unbuilt")
    assert status == 2 and "own.py:unbuilt' cannot be built: RuntimeError: no weights (" in text
    assert main(["rewards", "check", "bleu,rouge_l"]) == 2
    assert "names 2 rewards" in capsys.readouterr().err
    assert main(["rewards", "check", "no_such"]) == 2


def test_new_writes_here_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rewards", "new", "my_reward"]) == 0
    assert capsys.readouterr().out.startswith("my_reward: a package of one reward and its test")
    assert (tmp_path / "my_reward" / "my_reward.py").exists()
    assert main(["rewards", "new", "my_reward"]) == 2
    assert capsys.readouterr().err == (
        "my_reward exists already; nothing was written. Choose another name, or move it away\n"
    )
    assert main(["rewards", "check", "my_reward/my_reward.py:my_reward(shortest=2)"]) == 0
