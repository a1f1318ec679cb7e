"""CheXbert, SembScore, BERTScore, CIDEr beside their official packages, on the same files with random weights.

Needs bert_score 0.3.13, f1chexbert 0.0.2 (with scikit-learn < 1.8) and pycocoevalcap 1.2; what is absent is skipped.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests.encoders import ODD, REPORTS, chexbert_folder, roberta_folder
from unirg.evaluation.intervals import corpus_statistic
from unirg.scoring.contract import validated_terms
from unirg.scoring.registry import load_reward
from unirg_rewards.chexbert import CLASSES, f1_terms

TEXTS = [*REPORTS, *ODD]
CANDIDATES = [text for _ in REPORTS for text in TEXTS]
REFERENCES = [text for text in REPORTS for _ in TEXTS]


def _restore_removed_methods():
    """What the official packages call of tokenizers, and transformers 5 no longer has."""
    from transformers import PreTrainedTokenizerBase

    def with_ends(self, ids, *_):
        return [self.cls_token_id, *ids, self.sep_token_id]

    def encode_plus(self, text, **options):
        if isinstance(text, list):  # tokens
            return {"input_ids": with_ends(self, self.convert_tokens_to_ids(text))}
        return self(text, **options)

    for name, method in (("encode_plus", encode_plus), ("build_inputs_with_special_tokens", with_ends)):
        if not hasattr(PreTrainedTokenizerBase, name):
            setattr(PreTrainedTokenizerBase, name, method)


@pytest.fixture(scope="module")
def chexbert(tmp_path_factory):
    """The folder, and f1chexbert's labeler on the same files."""
    f1chexbert = pytest.importorskip("f1chexbert", reason="the f1chexbert package is not installed")
    _restore_removed_methods()
    folder = chexbert_folder(tmp_path_factory.mktemp("chexbert"))
    here = os.getcwd()
    os.chdir(folder)  # it loads bert-base-uncased by that name
    try:
        f1chexbert.f1chexbert.CACHE_DIR = str(folder)
        return folder, f1chexbert.F1CheXbert(device="cpu")
    finally:
        os.chdir(here)


def test_chexbert_reads_what_f1chexbert_reads(chexbert):
    folder, official = chexbert
    reward = load_reward("chexbert", {"model_folder": str(folder)})
    readings = reward.written._read(["", " ", *TEXTS])
    expected = [official.get_label(text, mode="classification") for text in ("", " ", *TEXTS)]
    names = {"": 0, 1: 1, 0: 2, -1: 3}
    assert [list(reading.states) for reading in readings] == [[names[state] for state in row] for row in expected]
    assert len({tuple(row) for row in expected}) > 5  # else the test would show little


def test_corpus_f1_is_f1chexberts_report(chexbert):
    folder, official = chexbert
    references = [REPORTS[index % len(REPORTS)] for index in range(len(TEXTS))]
    _, _, fourteen, five = official(hyps=TEXTS, refs=references)
    terms = load_reward("chexbert", {"model_folder": str(folder)}).corpus_terms(TEXTS, references)
    figures = {name: corpus_statistic(rows).value for name, rows in terms.items()}
    expected = {f"{kind}_14": fourteen[f"{kind} avg"]["f1-score"] for kind in ("micro", "macro")}
    expected |= {f"{kind}_5": five[f"{kind} avg"]["f1-score"] for kind in ("micro", "macro")}
    assert figures == pytest.approx(expected, abs=1e-12)


def test_corpus_f1_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.3):
        stated, wanted = (rng.random((9, len(CLASSES))) < share for _ in range(2))
        ids = [str(number) for number in range(len(stated))]
        terms = validated_terms("chexbert", f1_terms(stated.tolist(), wanted.tolist()), ids)
        # a corpus without a positive is 0 there, and undefined here
        figures = {name: np.nan_to_num(corpus_statistic(rows).value) for name, rows in terms.items()}
        for name, chosen in (("14", slice(None)), ("5", [1, 4, 5, 7, 9])):
            for kind in ("micro", "macro"):
                expected = metrics.f1_score(wanted[:, chosen], stated[:, chosen], average=kind, zero_division=0)
                assert figures[f"{kind}_{name}"] == pytest.approx(expected, abs=1e-12)


def test_semb_score_is_the_cosine_of_the_official_models_cls(chexbert):
    folder, official = chexbert

    def vector(text):
        import pandas
        from f1chexbert.f1chexbert import tokenize

        [ids] = tokenize(pandas.Series([text]), official.tokenizer)
        with torch.no_grad():
            return official.model.bert(torch.tensor([ids]))[0][0, 0]

    expected = [torch.cosine_similarity(vector(a), vector(b), dim=0).item() for a, b in zip(CANDIDATES, REFERENCES)]
    scores = load_reward("semb_score", {"model_folder": str(folder)}).score(CANDIDATES, REFERENCES)
    assert scores == pytest.approx(expected, abs=1e-6)
    empty, full = ["", " ", REPORTS[0], ""], [REPORTS[0], REPORTS[1], "", ""]
    expected = [torch.cosine_similarity(vector(a), vector(b), dim=0).item() for a, b in zip(empty, full)]
    scores = load_reward("semb_score", {"model_folder": str(folder), "official_edges": True}).score(empty, full)
    assert scores == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    pytest.importorskip("bert_score", reason="the bert_score package is not installed")
    _restore_removed_methods()
    return roberta_folder(tmp_path_factory.mktemp("models") / "roberta")


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("layer", [1, 2])
def test_bertscore_is_the_packages(roberta, tmp_path, layer, rescale, idf):
    from bert_score import BERTScorer
    from transformers import AutoTokenizer

    baseline, corpus = str(roberta / "baseline.tsv"), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"report": text}) + "\n" for text in REPORTS), encoding="utf-8")
    official = BERTScorer(
        model_type=str(roberta),
        num_layers=layer,
        idf=idf,
        idf_sents=[""] if idf else None,
        nthreads=0,
        device="cpu",
        lang="en",
        rescale_with_baseline=rescale,
        baseline_path=baseline,
    )
    # It asks for the first word's blank as an argument of `encode`, which transformers 5 takes at loading alone.
    official._tokenizer = AutoTokenizer.from_pretrained(roberta, add_prefix_space=True)
    if idf:
        official.compute_idf(list(REPORTS))
    # One pair at a time: in a batch the package matches with padding too, at cosine 0.
    expected = [official.score([text], [other])[2].item() for text, other in zip(CANDIDATES, REFERENCES)]
    options = {"model": "tiny", "model_folder": str(roberta), "layer": layer, "rescale": rescale}
    options |= {"baseline": baseline} if rescale else {}
    options |= {"idf_corpus": str(corpus)} if idf else {}
    scores = load_reward("bertscore", options).score(CANDIDATES, REFERENCES)
    assert scores == pytest.approx(expected, abs=1e-6)
    empty, full = ["", " ", REPORTS[0]], [REPORTS[0], REPORTS[1], ""]
    expected = [official.score([text], [other])[2].item() for text, other in zip(empty, full)]
    scores = load_reward("bertscore", options | {"official_edges": True}).score(empty, full)
    assert scores == pytest.approx(expected, abs=1e-6)


def test_the_built_in_baselines_and_layers_are_the_packages():
    package = pytest.importorskip("bert_score", reason="the bert_score package is not installed")
    from pathlib import Path

    from bert_score.utils import model2layers

    from unirg_rewards.bertscore import KNOWN, read_baseline

    for model, (layer, baseline) in KNOWN.items():
        assert model2layers[model] == layer
        file = Path(package.__file__).parent / "rescale_baseline" / "en" / f"{model}.tsv"
        assert read_baseline(str(file), layer) == pytest.approx(baseline, abs=1e-8)


def test_cider_is_pycocoevalcaps(tmp_path):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="pycocoevalcap is not installed")
    rng = np.random.default_rng(1)
    words = " ".join(REPORTS).split()
    candidates = [" ".join(rng.choice(words, size)) for size in (1, 2, 3, 8, 20, 40, 9)] + list(ODD)
    candidates += [report[: len(report) * 2 // 3] for report in REPORTS] + [REPORTS[1] + " " + REPORTS[0]]
    references = [REPORTS[(index + 4) % len(REPORTS)] for index in range(len(candidates))]
    official = scorer.CiderScorer()
    for candidate, reference in zip(candidates, references):
        official += (candidate, [reference])
    _, expected = official.compute_score()
    corpus = tmp_path / "references.jsonl"
    corpus.write_text("".join(json.dumps({"report": text}) + "\n" for text in references), encoding="utf-8")
    scores = load_reward("cider", {"corpus": str(corpus)}).score(candidates, references)
    assert scores == pytest.approx(list(expected), abs=1e-9)
    assert max(scores) > 1


def test_meteor_is_pycocoevalcaps():
    package = pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("there is no `java` on the path")
    candidates = [*REPORTS[:4], "Lungs are clear. Mild cardiomegaly.", "", "Effusion ||| small\n\nleft", "🫁 clear"]
    references = [REPORTS[0], REPORTS[0], REPORTS[0], REPORTS[3], REPORTS[1], REPORTS[1], REPORTS[0], "Lungs clear"]
    lines = [" ".join(text.replace("|||", " ").split()) for text in candidates]
    keys = range(len(candidates))
    _, expected = package.Meteor().compute_score({k: [references[k]] for k in keys}, {k: [lines[k]] for k in keys})
    reward = load_reward("meteor")
    assert reward.score(candidates, references) == pytest.approx(expected, abs=1e-12)
    assert reward.identity["pycocoevalcap"]
    assert 0 < expected[1] < expected[4] < expected[0]
