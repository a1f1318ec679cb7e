"""RadGraph archives: packed and unpacked ones, and what is not RadGraph's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.radgraph_archives import write_archive
from unirg_rewards.radgraph_archive import ENCODER, read_archive
from unirg_rewards.radgraph_f1 import RadGraphF1


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("radgraph"), "radgraph-xl", ner_bias=0.0)


def test_a_packed_archive_is_the_same_archive(tmp_path, archive):
    folder = write_archive(tmp_path, "radgraph-xl", packed=True)
    packed = read_archive("radgraph-xl", str(folder))
    assert packed.path.name == "radgraph-xl.tar.gz"
    assert packed.fingerprint == read_archive("radgraph-xl", str(packed.path)).fingerprint
    shutil.unpack_archive(packed.path, tmp_path / "by hand")
    unpacked = read_archive("radgraph-xl", str(tmp_path / "by hand"))
    assert unpacked.fingerprint == packed.fingerprint != read_archive("radgraph-xl", str(archive)).fingerprint
    assert Path(packed.encoder) == folder / "encoder-of-radgraph-xl"


@pytest.fixture
def copy(tmp_path, archive):
    """A copy of an archive, to spoil."""
    return Path(shutil.copytree(archive / "radgraph-xl", tmp_path / "copy"))


def spoil(copy, change):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))


def spoil_weights(copy, change):
    weights = torch.load(copy / "weights.th", weights_only=True)
    change(weights)
    torch.save(weights, copy / "weights.th")


SPOILT = {
    "no config.json, here or in radgraph-xl/": (
        lambda copy: (copy / "config.json").unlink(),
        "expected config.json and weights.th there or in radgraph-xl/, or radgraph-xl.tar.gz",
    ),
    "labels of another model": (
        lambda copy: (copy / "vocabulary/radgraph-xl__ner_labels.txt").rename(copy / "vocabulary/None__ner_labels.txt"),
        "has no vocabulary/radgraph-xl__ner_labels.txt",
    ),
    "no null label": (
        lambda copy: (copy / "vocabulary/radgraph-xl__ner_labels.txt").write_text("a\nb\n"),
        "must be empty",
    ),
    "too few labels": (
        lambda copy: (copy / "vocabulary/radgraph-xl__relation_labels.txt").write_text("modify\n"),
        "scores 3 classes, its labels make 1",
    ),
    "a configuration of something else": (
        lambda copy: spoil(copy, lambda config: config["model"].pop("modules")),
        "config.json has no 'modules'",
    ),
    "half a configuration": (
        lambda copy: (copy / "config.json").write_text('{"model": '),
        "config.json is no JSON",
    ),
    "coreference": (
        lambda copy: spoil(copy, lambda config: config["model"]["modules"]["coref"].update(coref_prop=2)),
        "coref_prop 2",
    ),
    "an encoder that is not there": (
        lambda copy: spoil(
            copy, lambda config: config["model"]["embedder"]["token_embedders"]["bert"].update(model_name="/no/encoder")
        ),
        "put its config.json and tokenizer files",
    ),
    "weights of another encoder": (
        lambda copy: spoil_weights(copy, lambda weights: weights.pop(f"{ENCODER}encoder.layer.0.output.dense.bias")),
        "missing: encoder.layer.0.output.dense.bias",
    ),
    "a scorer without weights": (
        lambda copy: spoil_weights(
            copy, lambda weights: weights.pop("_relation._relation_scorers.radgraph-xl__relation_labels.bias")
        ),
        "weights.th has no '_relation._relation_scorers.radgraph-xl__relation_labels.bias'",
    ),
    "code in place of weights": (
        lambda copy: torch.save({"weights": Path("x")}, copy / "weights.th"),
        "no plain state dict",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_an_archive_that_is_not_radgraphs_is_refused(copy, fault):
    change, message = SPOILT[fault]
    change(copy)
    with pytest.raises((OSError, ValueError), match=message.replace("(", r"\(")) as error:
        RadGraphF1(model_folder=str(copy)).setup()
    assert str(copy) in str(error.value)


def test_a_broken_download_is_named(tmp_path):
    (tmp_path / "radgraph-xl.tar.gz").write_bytes(b"<html>")
    with pytest.raises(OSError, match=r"radgraph-xl\.tar\.gz cannot be read .* fetch it again"):
        RadGraphF1(model_folder=str(tmp_path)).setup()


def test_without_a_folder_or_the_hub_the_message_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"fetch radgraph-xl\.tar\.gz from https://huggingface.co/StanfordAIMI/RRG_scorers"
    ):
        RadGraphF1().setup()
