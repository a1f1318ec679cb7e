"""`unirg audit`: verdicts on rewards whose faults are known, the weighted sum, and exit statuses."""

import json
import re

import pytest

from unirg.cli import main
from unirg.errors import UserError
from unirg.scoring.audit import SUM, audit_rewards, prior_text
from unirg.scoring.audit_view import in_words
from unirg.scoring.contract import RewardConfig
from unirg.study import Study

REPORTS = (
    "Findings: Small left pleural effusion. The heart is mildly enlarged. No pneumothorax. The lungs are clear.",
    "Findings: There is an opacity in the right lower lobe. There is severe edema. There is no pleural effusion.",
    "Findings: The heart is normal in size. There is no pleural effusion or pneumothorax. The lungs are clear.",
    "Findings: The heart is normal in size. There is no pleural effusion or pneumothorax. The lungs are clear.",
    "Findings: A large right pneumothorax is seen. No focal opacity. No effusion. Pacemaker in place.",
)
REWARDS = '''
from collections import Counter

from unirg.extraction import extract

def length(candidates, references):
    return [float(len(text.split())) for text in candidates]

def silence(candidates, references):
    return [-float(len(text)) for text in candidates]

def perfect(candidates, references):
    """F1 over the statements of both, repetitions counted: no trick pays, wording is free."""
    def said(text):
        return Counter((m.finding, m.polarity, m.side, m.place, m.severity) for m in extract(text))
    pairs = [(said(c), said(r)) for c, r in zip(candidates, references)]
    return [2 * (c & r).total() / ((c.total() + r.total()) or 1) for c, r in pairs]

def same(candidates, references):
    return [0.5] * len(candidates)

def verbatim(candidates, references):
    return [float(candidate == reference) for candidate, reference in zip(candidates, references)]

def choosy(candidates, references):
    """Judges nothing blank, and no study whose report speaks of edema."""
    return [None if not c.strip() or "edema" in r else float(c == r) for c, r in zip(candidates, references)]
'''


@pytest.fixture
def path(tmp_path):
    (tmp_path / "own.py").write_text(REWARDS)
    return tmp_path / "own.py"


def audited(path, *names, aggregation=None, **weights):
    configs = [RewardConfig(name=f"{path}:{name}", weight=weights.get(name, 1.0)) for name in names]
    studies = [Study(str(i)) for i in range(len(REPORTS))]
    found = audit_rewards("test", configs, studies, REPORTS, aggregation)
    return found, {subject.label: subject for subject in found.subjects}


def verdicts(subject, verdict):
    return {
        (base, name) for base, all_of in subject.outcomes.items() for name, o in all_of.items() if o.verdict == verdict
    }


def test_a_reward_for_length_pays_for_length(path):
    found, subjects = audited(path, "length")
    subject = subjects["length"]
    assert not found.passes
    assert subject.wins[0][1] == "2,000 words"
    assert {name for _, name in subject.wins} >= {"2,000 words", "sentence repeated", "findings spammed"}
    assert ("own", "empty") in verdicts(subject, "loses")
    own = subject.outcomes["own"]["2,000 words"]
    words = [len(text.split()) for text in REPORTS]
    assert own.difference == pytest.approx(2000 - sum(words) / 5)
    assert (own.reports, own.judged, own.pays) == (5, 5, 1.0)
    assert subject.unchanged["own"] == pytest.approx(sum(words) / 5)
    assert "FAILS" in in_words(subject)[0] and "2,000 words on" in in_words(subject)[0]


def test_a_reward_for_silence_pays_for_silence(path):
    found, subjects = audited(path, "silence")
    assert not found.passes
    assert subjects["silence"].wins[0][1] == "empty"
    assert ("own", "2,000 words") in verdicts(subjects["silence"], "loses")


def test_under_a_perfect_reward_harm_loses_and_wording_is_free(path):
    found, subjects = audited(path, "perfect")
    assert found.passes
    subject = subjects["perfect"]
    assert not verdicts(subject, "wins") | verdicts(subject, "moves")
    applied = {(base, name) for base, all_of in subject.outcomes.items() for name, o in all_of.items() if o.judged}
    losing = verdicts(subject, "loses")
    assert {name for _, name in losing} == {
        "empty",
        "whitespace",
        "one word",
        "headers only",
        "normal template",
        "negation flip",
        "laterality swap",
        "severity change",
        "finding dropped",
        "finding invented",
        "findings spammed",
        "sentence repeated",
        "2,000 words",
    }
    assert losing | verdicts(subject, "keeps") == applied
    assert subject.outcomes["own"]["prior copied"].verdict == "none"
    assert subject.outcomes["own"]["normal template"].reports == 3  # two of the five are normal


def test_a_constant_reward_minds_nothing(path):
    found, subjects = audited(path, "same")
    assert found.passes  # nothing wins; but that nothing loses is said
    assert subjects["same"].yardstick == 0
    assert not verdicts(subjects["same"], "loses")
    assert "hardly minds" in in_words(subjects["same"])[1]


def test_a_reward_for_the_very_words_minds_harmless_changes(path):
    _, subjects = audited(path, "verbatim")
    assert ("own", "paraphrase") in verdicts(subjects["verbatim"], "moves")
    assert any("though harmless" in line and "paraphrase" in line for line in in_words(subjects["verbatim"]))


def test_what_is_masked_is_not_counted(path):
    _, subjects = audited(path, "choosy")
    empty = subjects["choosy"].outcomes["own"]["empty"]
    assert (empty.reports, empty.judged, empty.verdict) == (5, 0, "none")
    assert subjects["choosy"].outcomes["own"]["upper case"].judged == 4


def test_the_weighted_sum_decides_for_a_stage(path):
    found, subjects = audited(path, "perfect", "length", aggregation="sum_then_normalise", length=1e-5)
    assert subjects["length"].wins and not subjects[SUM].wins
    assert found.passes
    for base in ("own", "draft"):
        for name, outcome in subjects[SUM].outcomes[base].items():
            parts = [subjects[label].outcomes[base][name].difference for label in ("perfect", "length")]
            if outcome.difference is not None:
                assert outcome.difference == pytest.approx(parts[0] + 1e-5 * parts[1])
    found, subjects = audited(path, "perfect", "length", aggregation="sum_then_normalise", length=1.0)
    assert subjects[SUM].wins and not found.passes


def test_normalised_sums_do_not_depend_on_a_rewards_scale(path, tmp_path):
    _, small = audited(path, "perfect", "length", aggregation="normalise_then_sum")
    path.write_text(REWARDS.replace("float(len(text.split()))", "1000.0 * len(text.split())"))
    other = tmp_path / "again.py"  # a file is executed once per process
    other.write_text(path.read_text())
    _, large = audited(other, "perfect", "length", aggregation="normalise_then_sum")
    for name, outcome in small[SUM].outcomes["own"].items():
        assert large[SUM].outcomes["own"][name].difference == pytest.approx(outcome.difference)
    assert small[SUM].wins


def test_a_sum_masks_texts_that_lack_a_reward_and_leaves_out_one_that_a_study_lacks(path):
    _, subjects = audited(path, "length", "choosy", aggregation="sum_then_normalise")
    empty = subjects[SUM].outcomes["own"]["empty"]
    assert (empty.reports, empty.judged) == (5, 1)  # the study without any `choosy` has its length
    assert subjects[SUM].outcomes["own"]["upper case"].judged == 5


def test_reports_that_do_not_differ_cannot_be_audited(path):
    config = [RewardConfig(name=f"{path}:length")]
    for texts in (["Left effusion."], ["Left effusion."] * 3, ["", " "]):
        with pytest.raises(UserError, match=r"^thing: (an audit needs at least two reports|no report has any text)"):
            audit_rewards("thing", config, [Study(str(i)) for i in range(len(texts))], texts)


def test_prior_reports_of_data_and_of_files():
    assert prior_text(Study("a", prior=Study("b", findings="Left  nodule."))) == "Findings: Left nodule."
    assert prior_text(Study("a", extra={"prior": "Left nodule."})) == "Left nodule."
    assert prior_text(Study("a", extra={"prior": {"report": "Left nodule."}})) == "Left nodule."
    assert prior_text(Study("a", extra={"prior": {"impression": "Nodule."}})) == "Impression: Nodule."
    assert prior_text(Study("a", extra={"prior": 3})) == prior_text(Study("a")) == ""


@pytest.fixture
def references(tmp_path):
    rows = [{"id": str(i), "report": text, "prior": "Left nodule."} for i, text in enumerate(REPORTS)]
    (tmp_path / "R.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "R.jsonl"


def test_status_1_where_a_harmful_change_wins_else_0(path, references, capsys, tmp_path):
    command = ["audit", "--references", str(references), "--rewards"]
    assert main([*command, f"{path}:perfect,{path}:same"]) == 0
    printed = capsys.readouterr().out
    assert "perfect: no harmful change wins" in printed
    row = next(line for line in printed.splitlines() if line.startswith("│empty"))
    assert re.fullmatch(r"│empty +│ +5 / 3 │ +-1\.000 / -\.\d{3} │ +\+\.000~ / \+\.000~│", row)
    assert main([*command, f"{path}:perfect,{path}:length", "--json", "--plot", str(tmp_path / "a.png")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passes"] is False and found["tolerance"] == 0.05
    assert [subject["label"] for subject in found["subjects"]] == ["perfect", "length"]
    assert found["subjects"][0]["outcomes"]["own"]["prior copied"]["verdict"] == "loses"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_audited_is_status_2(path, references, capsys, tmp_path):
    for command in (
        ["audit"],
        ["audit", "--rewards", "bleu"],
        ["audit", "r.yaml", "--rewards", "bleu", "--references", str(references)],
        ["audit", "--rewards", "blue", "--references", str(references)],
        ["audit", "--rewards", "bleu", "--references", str(tmp_path / "none.jsonl")],
        ["audit", "--rewards", "bleu", "--references", str(references), "--plot", str(tmp_path / "a.nothing")],
    ):
        assert main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


RECIPE = """
name: test
data: {{adapter: phantom, train: 40}}
policy: {{tiny: {{}}}}
stages:
  - name: sft
    kind: sft
    steps: 1
    optimiser: {{learning_rate: 1.0e-3}}
  - name: rl
    kind: grpo
    steps: 1
    optimiser: {{learning_rate: 1.0e-3}}
    rewards:
      - {{name: entity_f1}}
      - {{name: "{path}:length", weight: 1.0e-6}}
"""


def test_a_recipes_stages_are_audited_on_their_training_reports(path, capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(path=path))
    assert main(["audit", str(recipe), "--json", "stages.rl.rewards.1.weight=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["studies"]) == ("rl", 40)
    assert [subject["decides"] for subject in found["subjects"]] == [False, False, True]
    assert main(["audit", str(recipe), "stages.rl.rewards.1.weight=1"]) == 1
    assert "weighted sum: FAILS" in capsys.readouterr().out


def test_a_recipe_without_grpo_has_nothing_to_audit(path, capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(path=path).partition("  - name: rl")[0])
    assert main(["audit", str(recipe)]) == 2
    assert "no stage of kind grpo" in capsys.readouterr().err
