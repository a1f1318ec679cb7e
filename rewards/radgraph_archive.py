"""A RadGraph archive as its authors publish it, read without their package and without running what it holds.

An archive is a folder, or a .tar.gz of one, with `config.json`, `weights.th` (a state dict, read with weights_only) and
`vocabulary/<model>__ner_labels.txt` and `<model>__relation_labels.txt`. The published ones are `<model>.tar.gz` in
StanfordAIMI/RRG_scorers on the Hugging Face hub. They hold the encoder's weights but neither its configuration nor its
tokenizer: `config.json` names the hub id (or folder) of these two.
"""

import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch

HUB = "StanfordAIMI/RRG_scorers"
ENCODER = "_embedder.token_embedder_bert._matched_embedder.transformer_model."


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    `path` is the folder or file it was read from. `fingerprint` is a SHA-256 over configuration, labels and weights.
    `ner_labels[0]` is "", no entity. `encoder` is where the encoder's configuration and tokenizer are: `encoder_folder`
    (in the archive's folder, or beside its .tar.gz) where that exists, else the hub id or folder config.json names.
    """

    path: Path
    fingerprint: str
    encoder: str
    encoder_folder: Path
    max_length: int
    max_span_width: int
    spans_per_word: float
    ner_labels: tuple[str, ...]
    relation_labels: tuple[str, ...]
    weights: dict[str, torch.Tensor]

    def weight(self, key: str) -> torch.Tensor:
        """The tensor of that name. Raises ValueError naming archive and key where there is none."""
        if key not in self.weights:
            raise ValueError(
                f"{self.path}: weights.th has no '{key}'; expected the state dict of RadGraph's DyGIE model"
            )
        return self.weights[key]


def read_archive(model: str, model_folder: str | None) -> Archive:
    """The archive of `model`: in `model_folder` (the archive's own folder or .tar.gz, or a folder that holds
    `<model>/` or `<model>.tar.gz`), else from the hub or its local cache.

    Raises OSError where there is none, saying what to fetch; ValueError where its contents are not RadGraph's.
    """
    path = _find(model, model_folder)
    files = _read_folder(path) if path.is_dir() else _read_tar(path)
    names = {kind: f"vocabulary/{model}__{kind}_labels.txt" for kind in ("ner", "relation")}
    for name in ("config.json", "weights.th", *names.values()):
        if name not in files:
            raise ValueError(f"{path} has no {name}; expected an archive of {model} (it has: {', '.join(files)})")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    ner_labels, relation_labels = (_labels(files[name]) for name in names.values())
    if not ner_labels or ner_labels[0]:
        raise ValueError(f"{path}: the first line of {names['ner']} must be empty (it stands for no entity)")
    try:
        config = json.loads(files["config.json"])
        source = config["model"]["embedder"]["token_embedders"]["bert"]
        modules, losses = config["model"]["modules"], config["model"]["loss_weights"]
        name, propagated = str(source["model_name"]), modules["coref"].get("coref_prop", 0)
        max_length, max_span_width = int(source["max_length"]), int(config["dataset_reader"]["max_span_width"])
        spans_per_word = float(modules["relation"]["spans_per_word"])
        scored = losses["ner"] > 0 and losses["relation"] > 0
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: config.json is no JSON ({error}); fetch the archive again") from error
    except KeyError as error:
        raise ValueError(
            f"{path}: config.json has no {error}; expected the configuration of a RadGraph model"
        ) from error
    if propagated or not scored:
        raise ValueError(
            f"{path}: config.json has coref_prop {propagated}, loss_weights {losses}; expected a model as published, "
            "with coref_prop 0 and loss_weights of ner and relation above 0"
        )
    try:
        weights = torch.load(io.BytesIO(files["weights.th"]), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: weights.th is no plain state dict, and is not read: {error}") from error
    beside = (path if path.is_dir() else path.parent) / Path(name).name
    return Archive(
        path=path,
        fingerprint=digest.hexdigest(),
        encoder_folder=beside,
        encoder=str(beside) if beside.is_dir() else name,
        ner_labels=ner_labels,
        relation_labels=relation_labels,
        weights=weights,
        max_length=max_length,
        max_span_width=max_span_width,
        spans_per_word=spans_per_word,
    )


def _find(model: str, model_folder: str | None) -> Path:
    if model_folder is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(hf_hub_download(HUB, f"{model}.tar.gz"))
        except (OSError, HfHubHTTPError) as error:
            raise OSError(
                f"the weights of {model} are neither on this machine nor to be had from the hub ({error}); fetch "
                f"{model}.tar.gz from https://huggingface.co/{HUB} and name its folder as model_folder"
            ) from error
    folder = Path(model_folder).expanduser()
    tried = [folder, folder / model, folder / f"{model}.tar.gz"]
    for path in tried:
        if path.is_file() or all((path / name).is_file() for name in ("config.json", "weights.th")):
            return path
    raise FileNotFoundError(
        f"model_folder {folder} holds no archive of {model}; expected config.json and weights.th there or in {model}/, "
        f"or {model}.tar.gz (from https://huggingface.co/{HUB})"
    )


def _wanted(name: str) -> bool:
    return name in ("config.json", "weights.th") or (name.startswith("vocabulary/") and name.endswith(".txt"))


def _read_folder(folder: Path) -> dict[str, bytes]:
    names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in names.items() if _wanted(name)}


def _read_tar(path: Path) -> dict[str, bytes]:
    """The wanted files, read into memory: nothing is unpacked to disk."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and _wanted(name) and (content := tar.extractfile(member)):
                    files[name] = content.read()
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{path} cannot be read as a .tar.gz ({error}); fetch it again") from error
    return files


def _labels(content: bytes) -> tuple[str, ...]:
    """One label a line; a line that is empty is a label too, but for the file's end."""
    lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    return tuple(lines[:-1] if lines[-1] == "" else lines)
