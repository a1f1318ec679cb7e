"""`unirg rewards check`: does a reward keep the contract, and what would a policy learn from it?"""

import textwrap

from unirg.data.phantom import PhantomData, load_phantom
from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.scoring.audit import BASES, Subject, Verdict, audit_rewards
from unirg.scoring.command import parse_rewards
from unirg.scoring.contract import RewardConfig, RewardError
from unirg.scoring.contract_check import check_contract
from unirg.scoring.probes import PROBES
from unirg.scoring.registry import load_reward
from unirg.scoring.worker import described

STUDIES = 24
"""Generated studies whose reports are changed: about 700 texts to score."""
WIDTH = 120
WHERE = {"own": "on the study's own report", "draft": "on a half-right draft"}


def check_reward(text: str) -> int:
    """Print what is right and wrong with one reward, written as in `unirg score` (`path.py:fn`, `bleu(variant=coco4)`),
    and then in a paragraph what its scores of changed reports would teach a policy.

    Returns 1 where it breaks the contract, else 0: what it teaches is for its author to judge. Raises RewardError where
    it cannot be loaded or set up.
    """
    configs = parse_rewards(text)
    if len(configs) != 1:
        raise RewardError(f"'{text}' names {len(configs)} rewards; `unirg rewards check` takes one")
    try:
        reward = load_reward(configs[0].name, configs[0].options)
        reward.setup()
    except UserError:
        raise
    except Exception as error:  # whatever the reward's own code raises
        raise RewardError(f"reward '{text}' cannot be set up: {described(error)}") from error
    findings = check_contract(reward)
    for finding in findings:
        label = "WRONG" if finding.kind == "wrong" else finding.kind
        print(textwrap.fill(finding.text, WIDTH, initial_indent=f"{label:<7}", subsequent_indent=" " * 7))
    wrong = sum(finding.kind == "wrong" for finding in findings)
    print(f"\n{text} {f'breaks the contract: see the {wrong} marked WRONG' if wrong else 'keeps the contract'}.\n")
    print(textwrap.fill(_lesson(configs[0]), WIDTH, break_on_hyphens=False))
    return 1 if wrong else 0


def _lesson(config: RewardConfig) -> str:
    """One paragraph: the harmful changes that pay, those that cost next to nothing, the harmless ones that cost."""
    studies = load_phantom(PhantomData(train=STUDIES, reports="complete"), "train")
    try:
        audit = audit_rewards(config.name, [config], studies, [report_text(study) for study in studies])
    except (UserError, SystemExit) as error:
        return f"What a policy would learn from it cannot be said: {described(error)}"
    (subject,) = audit.subjects
    intro = f"What a policy would learn from it, by changes of {audit.studies} generated reports:"
    own = "`unirg audit --rewards NAME --references FILE` asks the same of your own reports."
    return " ".join([intro, *_sentences(subject), own])


def _sentences(subject: Subject) -> list[str]:
    ranked = subject.ranked()
    if not ranked:
        return ["nothing, for it could judge none of them."]
    base, name = ranked[0]
    best = subject.outcomes[base][name]
    says = next(probe.says for probe in PROBES if probe.name == name)
    best_paid = f"{name} ({says}), {best.difference:+.3f} on average {WHERE[base]}"
    wins = _listed(subject, "wins")
    hardly = [found for found in _listed(subject, "hardly") if found not in wins]
    minded = _listed(subject, "moves")
    if subject.wins:
        others = [found for found in wins if found != name]
        sentences = [f"harm pays. Best paid is {best_paid}, a gain in {best.pays:.0%} of {best.judged}."]
        sentences += [f"It also pays for {', '.join(others)}."] if others else []
    else:
        sentences = [f"no harmful change pays; the cheapest is {best_paid}."]
    if hardly:
        sentences.append(f"Little or nothing is lost by {', '.join(hardly)}: nothing keeps a policy from these.")
    if minded:
        sentences.append(f"Harmless, and yet they move the score: {', '.join(minded)}.")
    return sentences


def _listed(subject: Subject, verdict: Verdict) -> list[str]:
    """The probes with this verdict on either text."""
    return [p.name for p in PROBES if verdict in {subject.outcomes[base][p.name].verdict for base in BASES}]
