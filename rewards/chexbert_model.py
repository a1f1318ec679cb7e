"""CheXbert (Smit et al., EMNLP 2020): 14 observations of a chest report, and the vector it reads them from.

A bert-base-uncased encoder; 13 heads that say of an observation blank, positive, negative or uncertain, and one that
says of No Finding blank or positive, all from the last layer's [CLS]. As in the official labeler white space is joined,
and of a report beyond 512 tokens the first 511 and [SEP] are read.

The checkpoint is the published one: `chexbert.pth` with `model_state_dict`, its names `module.bert.*` and
`module.linear_heads.{0..13}.*`. Its encoder's configuration and vocabulary are bert-base-uncased's.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unirg.scoring.contract import RewardError

from .text_encoder import Encoder, Recent, fingerprint, for_inference

CLASSES = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
FIVE = (1, 4, 5, 7, 9)  # Cardiomegaly, Edema, Consolidation, Atelectasis, Pleural Effusion
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
FILE = "chexbert.pth"
HUB = "StanfordAIMI/RRG_scorers"
BERT = "bert-base-uncased"
LIMIT = 512
REPORTS = 20_000  # remembered
NEEDS = f"CheXbert's {FILE} (hub {HUB}) in `model_folder`, and {BERT}'s config.json and vocab.txt"
_HEADS = (4,) * 13 + (2,)


class Reading(NamedTuple):
    """What CheXbert says of a report: per class BLANK, POSITIVE, NEGATIVE or UNCERTAIN; the [CLS] vector (E), float32;
    and whether the report holds no token at all, so that the rest says nothing."""

    states: tuple[int, ...]
    vector_E: np.ndarray
    empty: bool


class CheXbert:
    """The loaded model. Readings of the last REPORTS texts are kept: a reference is read once for all its candidates,
    and once for all rewards of the process that use this model."""

    def __init__(self, encoder: Encoder, heads_weight: Any, heads_bias: Any) -> None:
        self.encoder = encoder
        self._weight_LE, self._bias_L = heads_weight, heads_bias
        self._readings: Recent[Reading] = Recent(REPORTS)

    def read(self, reports: Sequence[str]) -> list[Reading]:
        """One reading per report."""
        texts = [re.sub(r"\s+", " ", report.replace("\n", " ")).strip() for report in reports]
        readings = self._readings.look_up(texts, self._read)
        return [readings[text] for text in texts]

    def _read(self, texts: list[str]) -> list[Reading]:
        import torch

        ids = self.encoder.tokenizer(texts, truncation=True, max_length=self.encoder.limit)["input_ids"]
        readings: dict[int, Reading] = {}
        for rows, states_BTE in self.encoder.batches(ids):
            with torch.inference_mode():
                vectors_BE = states_BTE[:, 0]
                logits_BL = torch.nn.functional.linear(vectors_BE, self._weight_LE, self._bias_L)
                states_BC = torch.stack([head.argmax(dim=1) for head in logits_BL.split(_HEADS, dim=1)], dim=1)
            for row, states, vector_E in zip(rows, states_BC.tolist(), vectors_BE.cpu().numpy(), strict=True):
                readings[row] = Reading(tuple(states), vector_E.copy(), empty=len(ids[row]) <= 2)
        return [readings[row] for row in range(len(texts))]


@lru_cache(maxsize=4)
def load_chexbert(model_folder: str | None, bert: str | None, device: str) -> CheXbert:
    """CheXbert from its checkpoint, once per process.

    `model_folder` holds chexbert.pth, or is the file; None takes it from the hub. `bert` is a folder with the encoder's
    config.json and vocabulary, or a hub id; by default they are looked for beside the checkpoint, in its folder's
    `bert-base-uncased/`, and then on the hub. Raises RewardError saying what is missing, or what the checkpoint lacks.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

    checkpoint = _find_checkpoint(model_folder)
    source = bert or _find_bert(checkpoint.parent)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RewardError(
            f"CheXbert: no configuration and vocabulary at '{source}' ({error}). Put {BERT}'s config.json, vocab.txt "
            f"and tokenizer files into {checkpoint.parent / BERT}/, or name their folder as option `bert`"
        ) from error
    if not isinstance(config, BertConfig):
        raise RewardError(f"CheXbert: {source} configures a {config.model_type}, expected {BERT}'s bert")
    state = _read_state(checkpoint)
    model = BertModel(config, add_pooling_layer=False)
    shapes = {f"bert.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for number, outputs in enumerate(_HEADS):
        shapes[f"linear_heads.{number}.weight"] = (outputs, config.hidden_size)
        shapes[f"linear_heads.{number}.bias"] = (outputs,)
    _check_state(checkpoint, source, state, shapes)
    model.load_state_dict({name: state[f"bert.{name}"] for name in model.state_dict()})
    heads = {
        part: torch.cat([state[f"linear_heads.{number}.{part}"].float() for number in range(14)]).to(device)
        for part in ("weight", "bias")
    }
    limit = min(LIMIT, config.max_position_embeddings)
    encoder = Encoder(for_inference(model.float(), device), tokenizer, limit, device, fingerprint(checkpoint))
    return CheXbert(encoder, heads["weight"], heads["bias"])


def _find_checkpoint(model_folder: str | None) -> Path:
    if model_folder is not None:
        path = Path(model_folder).expanduser()
        path = path / FILE if path.is_dir() else path
        if path.is_file():
            return path
        raise RewardError(f"CheXbert: {path} is not there; expected {FILE} as published (hub {HUB})")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB, FILE))
    except Exception as error:  # no network, no access, no such file: the remedy is one
        raise RewardError(
            f"CheXbert: {FILE} cannot be had from the hub ({type(error).__name__}: {error}). Fetch it with `hf "
            f"download {HUB} {FILE} --local-dir FOLDER` where there is a network, and give FOLDER as `model_folder`"
        ) from error


def _find_bert(folder: Path) -> str:
    for place in (folder / BERT, folder):
        if (place / "config.json").is_file():
            return str(place)
    return BERT


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's tensors by name, without `module.` and without what no reading needs."""
    import torch

    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RewardError(f"CheXbert: {checkpoint} is no checkpoint of tensors ({error})") from error
    if not isinstance(saved, Mapping) or not isinstance(saved.get("model_state_dict"), Mapping):
        raise RewardError(f"CheXbert: {checkpoint} has no 'model_state_dict'; expected {FILE} as published (hub {HUB})")
    state = {name.removeprefix("module."): tensor for name, tensor in saved["model_state_dict"].items()}
    # The pooler is unused, and older releases of transformers saved the positions 0, 1, 2, ... as a tensor.
    unused = ("bert.pooler.", "bert.embeddings.position_ids")
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def _check_state(
    checkpoint: Path, source: str, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for problem, names in (("lacks", shapes.keys() - state.keys()), ("has besides", state.keys() - shapes.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise RewardError(f"CheXbert: {checkpoint} {problem} {len(names)} tensors of {source}'s model: {shown}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise RewardError(
                f"CheXbert: {checkpoint}: {name} is {found}, expected {shape} by {source}'s configuration"
            )
