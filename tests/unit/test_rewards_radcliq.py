"""RadCliQ and R1: the published constants and figures, and how they are put together."""

import json
import math

import pytest

from tests.encoders import ODD, REPORTS, chexbert_folder, roberta_folder
from unirg.evaluation.intervals import corpus_statistic
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward
from unirg_rewards.radcliq import radcliq
from unirg_rewards.text_encoder import SHARES
from unirg_rewards.uni_r1 import WEIGHTS, r1


@pytest.mark.parametrize(
    ("components", "version", "expected"),
    [
        ((1, 1, 1, 1), "v1", -1.4407),  # an exact match
        ((0.5, 1, 1, 1), "v1", -0.8181),  # one without relations, where RadGraph's mean of two F1 is 0.5
        ((0, 0, 0, 0), "v1", 2.4501),
        ((0, 0, 0, 0), "v0", 5.516161),
        ((1, 0, 0, 0), "v0", 5.516161 - 1.589034),
        ((0, 1, 0, 0), "v0", 5.516161 - 3.009830),
        ((0, 0, 1, 0), "v0", 5.516161 - 1.873372),
        ((0, 0, 0, 1), "v0", 5.516161 + 0.713942),  # the higher BLEU, the worse
    ],
)
def test_the_published_constants(components, version, expected):
    assert radcliq(*components, version=version) == pytest.approx(expected, abs=5.1e-5)


def test_v1_as_a_linear_form():
    for radgraph, bertscore, semb_score, bleu in ((0.2, 0.4, 0.3, 0.9), (0.9, -1, -1, 0), (0, 0.7, 0.1, 0.4)):
        expected = 2.450143 - 1.245216 * radgraph - 1.650845 * bertscore - 0.994772 * semb_score
        assert radcliq(radgraph, bertscore, semb_score, bleu) == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize(
    ("bertscore", "semb_score", "radgraph", "printed"),
    [
        (0.293, 0.242, 0.102, 0.625),
        (0.421, 0.426, 0.236, 0.962),
        (0.437, 0.435, 0.198, 0.950),
        (0.449, 0.478, 0.267, 1.110),
    ],
)
def test_unirgs_printed_table(bertscore, semb_score, radgraph, printed):
    # MIMIC, findings and impression. RadCliQ is linear, so that mean components give the mean. Components printed with
    # three digits leave 0.0024 of play; one row is 0.0029 away.
    assert 1 / radcliq(radgraph, bertscore, semb_score, 0) == pytest.approx(printed, abs=0.0035)


def test_radevals_exact_match_is_that_of_a_bertscore_whose_words_weigh_nothing():
    # It prints 9.3726: with one reference all idf weights are log(1) = 0, raw BERTScore is 0 and rescales to -5.55.
    assert radcliq(1, -0.8473319 / (1 - 0.8473319), 1, 1) == pytest.approx(9.3726, abs=5e-5)


def test_per_report_the_reciprocal_puts_an_exact_match_below_a_poor_one():
    # why 1/RadCliQ is a corpus's figure and the reward is -RadCliQ
    exact, poor = radcliq(0.5, 1, 1, 1), radcliq(0.1, 0.3, 0.3, 0.1)
    assert 1 / exact < 0 < 1 / poor
    assert -exact > -poor


def test_r1_is_the_printed_weighted_sum():
    assert r1(1, 1, 1) == pytest.approx(1)
    assert [r1(1, 0, 0), r1(0, 1, 0), r1(0, 0, 1)] == [0.370, 0.253, 0.377]
    # the absolute coefficients of RadCliQ-v1, rounded; there they stand for standardised components
    scale = {"radgraph": 0.3028258411, "bertscore": 0.2243093846, "semb_score": 0.2539439110}
    for name, weight in WEIGHTS.items():
        slope = radcliq(**{key: 0 for key in (*scale, "bleu")}) - radcliq(
            **{key: key == name for key in (*scale, "bleu")}
        )
        assert weight == pytest.approx(slope * scale[name], abs=5e-4)


class Given:
    """A component with given values; keeps what it was asked."""

    identity = {"given": True}
    shares = "given"

    def __init__(self, values):
        self.values, self.asked = values, None

    def setup(self, device="cpu"):
        self.device = device

    def score(self, candidates, references):
        self.asked = candidates, references
        return self.values


def composed(name, radgraph, bertscore, semb_score, **options):
    reward = load_reward(name, options)
    components = reward.written.components
    components.radgraph, components.bertscore, components.semb_score = map(Given, (radgraph, bertscore, semb_score))
    return reward


TEXTS = ["no  effusion .", "No effusion.", "Clear."], ["no effusion .", "Effusion.", "Clear."]


def test_a_composite_scores_each_pair_by_its_components():
    values = [0.2, 1.0, 0.5], [0.4, 0.9, -0.2], [0.3, 0.8, 0.1]
    bleu = load_reward("bleu").score(*TEXTS)
    assert 0 < bleu[1] < 1
    for version in ("v0", "v1"):
        expected = [-radcliq(*row, version) for row in zip(*values, bleu)]
        assert composed("radcliq", *values, version=version).score(*TEXTS) == pytest.approx(expected, abs=1e-12)
    expected = [0.370 * b + 0.253 * s + 0.377 * g for g, b, s in zip(*values)]
    assert composed("r1", *values).score(*TEXTS) == pytest.approx(expected, abs=1e-12)


def test_bertscore_alone_sees_blanks_joined():
    reward = composed("radcliq", [0.1] * 3, [0.1] * 3, [0.1] * 3)
    reward.score(*TEXTS)
    assert reward.written.components.bertscore.asked[0][0] == "no effusion ."
    assert reward.written.components.radgraph.asked == TEXTS


@pytest.mark.parametrize("name", ["radcliq", "r1"])
def test_what_one_component_cannot_judge_is_masked(name):
    reward = composed(name, [0.2, None, 0.5], [0.4, 0.9, 0.2], [0.3, 0.8, None])
    scores = reward.score(*TEXTS)
    assert scores[1:] == [None, None] and scores[0] is not None


def test_a_corpus_has_the_reciprocal_of_its_mean():
    reward = composed("radcliq", [0.2, 0.6, None], [0.4, 0.2, 0.1], [0.3, 0.5, 0.1])
    (figure, terms), *others = reward.corpus_terms(*TEXTS).items()
    statistic = corpus_statistic(terms)
    assert (figure, others) == ("reciprocal", [])
    assert statistic.value == pytest.approx(1 / radcliq(0.4, 0.3, 0.4, 0), abs=1e-9)
    assert statistic.judged == 2
    nothing = composed("radcliq", [None] * 3, [0.4] * 3, [0.3] * 3).corpus_terms(*TEXTS)
    assert math.isnan(corpus_statistic(nothing["reciprocal"]).value)


def test_components_are_the_published_ones_unless_options_say_otherwise():
    identity = load_reward("radcliq").identity
    json.dumps(identity)
    assert identity["metric"] == "-RadCliQ-v1"
    radgraph = {key: identity["radgraph"][key] for key in ("level", "model", "case")}
    assert radgraph == {"level": "combined", "model": "radgraph", "case": "pypi"}
    bertscore = {key: identity["bertscore"][key] for key in ("model", "layer", "baseline", "idf")}
    assert bertscore == {"model": "distilroberta-base", "layer": 5, "baseline": 0.8473319, "idf": False}
    assert identity["bleu"]["variant"] == "rexrank"
    identity = load_reward("r1", {"radgraph": {"level": "complete"}}).identity
    assert (identity["radgraph"]["level"], identity["radgraph"]["model"]) == ("complete", "radgraph")
    assert identity["standardised"] is False and "bleu" not in identity
    for options in ({"version": "v2"}, {"bertscore": {"layr": 5}}, {"radgraph": {"level": "whole"}}):
        with pytest.raises(RewardError, match=r"radcliq.*(v2|layr|whole)"):
            load_reward("radcliq", options)


def test_the_models_are_loaded_on_the_device_asked_for():
    reward = composed("r1", [0.1], [0.1], [0.1])
    reward.setup("cuda:3")
    components = reward.written.components
    assert {components.radgraph.device, components.bertscore.device, components.semb_score.device} == {"cuda:3"}
    assert reward.shares == ("given", SHARES)  # RadGraph's and the encoders'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    chexbert, roberta = chexbert_folder(folder / "chexbert"), roberta_folder(folder / "roberta", layers=6)
    return {"chexbert": {"model_folder": str(chexbert)}, "bertscore": {"model_folder": str(roberta)}}


def test_with_real_encoders_an_exact_match_wins_and_silence_loses(folders):
    candidates = ["", REPORTS[0], *REPORTS[1:], *ODD]
    references = [REPORTS[0]] * len(candidates)
    radgraph = Given([0.0, 1.0, *[0.0] * (len(candidates) - 2)])
    for name, best, worst in (("radcliq", 1.4407, -2.4501 - 1.6508 - 0.9948), ("r1", 1, -0.623)):
        reward = load_reward(name, folders)
        reward.written.components.radgraph = radgraph
        reward.setup()
        scores = reward.score(candidates, references)
        assert scores[1] == pytest.approx(best, abs=1e-3)
        assert scores[0] == pytest.approx(worst, abs=1e-3) == min(scores)
        assert max(scores) == scores[1]
        assert all(math.isfinite(score) for score in scores)
