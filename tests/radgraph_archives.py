"""Random-weight archives in the format that radgraph 0.1.18 loads, encoder configuration and tokenizer included.

Weights come from numpy's generator, so one seed gives one archive in every environment. They are drawn wide, so that
entities and relations occur; `ner_bias` and `relation_bias` make them rarer.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel

from unirg_rewards.radgraph_archive import ENCODER

WORDS = (
    "the heart is normal in size lungs are clear no focal consolidation pleural effusion pneumothorax small left "
    "right adjacent atelectasis mild cardiomegaly acute cardiopulmonary process edema lower lobe opacity there with of "
    "and or likely tube ends above carina unchanged severe bilateral"
)
NER = {
    "radgraph": ["ANAT-DP", "OBS-DA", "OBS-DP", "OBS-U"],
    "radgraph-xl": [
        "Observation::definitely present",
        "Anatomy::definitely present",
        "Observation::definitely absent",
        "Observation::uncertain",
        "Observation::measurement::definitely present",
    ],
}
NER["modern-radgraph-xl"] = NER["radgraph-xl"]
RELATIONS = ["modify", "located_at", "suggestive_of"]
FEATURES = 20
MAX_SPAN_WIDTH = 8


def write_archive(
    folder: Path,
    model: str,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    max_length: int = 64,
    scorer_width: int = 24,
    layer_scale: float = 1.5,
    ner_bias: float = -1.5,
    relation_bias: float = 0.0,
    packed: bool = False,
) -> Path:
    """Writes `<folder>/<model>/` (or `<model>.tar.gz` with `packed`) and, in `<folder>/encoder-of-<model>/`, what
    stands for the hub id of its encoder. Returns `folder`. `max_length` is where the encoder folds long reports.
    Many layers need a small `layer_scale`, or all words become alike."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))

    encoder = folder / f"encoder-of-{model}"
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * hidden, "max_position_embeddings": max(512, max_length)}
    if model == "modern-radgraph-xl":
        # In the form of transformers 4, as the published one: what version 5 writes, version 4 reads otherwise.
        size = _modern_tokenizer(encoder)
        marks = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        attention = {"local_attention": 16, "global_attn_every_n_layers": 2}
        attention |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
        config = {"model_type": "modernbert", "vocab_size": size, **attention, **marks, **sizes}
    else:
        config = {"model_type": "bert", "vocab_size": _bert_tokenizer(encoder), **sizes}
    (encoder / "config.json").write_text(json.dumps(config))
    weights: dict[str, torch.Tensor] = {}
    for name, value in AutoModel.from_config(AutoConfig.from_pretrained(encoder)).state_dict().items():
        if "norm" in name.lower() and name.endswith("weight"):
            weights[ENCODER + name] = torch.ones(value.shape)
        else:
            # Token embeddings are wide, so that words differ; layers keep the scale of what goes through them.
            wide = 1.0 if "embeddings" in name or value.dim() == 1 else layer_scale / value.shape[-1] ** 0.5
            weights[ENCODER + name] = drawn(*value.shape, scale=0.2 if value.dim() == 1 else wide)
    weights |= _span_layers(model, drawn, hidden, scorer_width, ner_bias, relation_bias)

    source = {"type": "pretrained_transformer_mismatched", "model_name": str(encoder), "max_length": max_length}
    events = {"trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.3}
    events["loss_weights"] = {"trigger": 0.2, "arguments": 1.0}  # type: ignore[assignment]
    modules = {
        "coref": {"spans_per_word": 0.3, "max_antecedents": 100, "coref_prop": 0},
        "events": events,
        "ner": {},
        "relation": {"spans_per_word": 0.5},
    }
    settings = {
        "dataset_reader": {"type": "dygie", "max_span_width": MAX_SPAN_WIDTH, "token_indexers": {"bert": source}},
        "model": {
            "type": "dygie",
            "embedder": {"token_embedders": {"bert": source}},
            "initializer": {},
            "module_initializer": {},
            "feature_size": FEATURES,
            "feedforward_params": {"dropout": 0.4, "hidden_dims": scorer_width, "num_layers": 2},
            "loss_weights": {"coref": 0, "events": 0, "ner": 0.2, "relation": 1},
            "max_span_width": MAX_SPAN_WIDTH,
            "target_task": "relation",
            "modules": modules,
        },
    }
    archive = folder / model
    (archive / "vocabulary").mkdir(parents=True)
    (archive / "config.json").write_text(json.dumps(settings))
    torch.save(weights, archive / "weights.th")
    (archive / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags\n")
    (archive / "vocabulary" / f"{model}__ner_labels.txt").write_text("\n".join(["", *NER[model]]) + "\n")
    (archive / "vocabulary" / f"{model}__relation_labels.txt").write_text("\n".join(RELATIONS) + "\n")
    if packed:
        with tarfile.open(folder / f"{model}.tar.gz", "w:gz") as tar:
            tar.add(archive, ".")
        archive.rename(folder / "unpacked")
    return folder


def _span_layers(
    model: str, drawn: Callable[..., torch.Tensor], hidden: int, width: int, ner_bias: float, relation_bias: float
) -> dict[str, torch.Tensor]:
    """Everything but the encoder; coreference and events are there because upstream loads strictly, and unused."""
    span = 2 * hidden + FEATURES
    weights = {
        "_endpoint_span_extractor._span_width_embedding.weight": drawn(MAX_SPAN_WIDTH, FEATURES),
        "_coref._distance_embedding.weight": drawn(10, FEATURES),
        "_events._distance_embedding.weight": drawn(10, FEATURES),
    }

    def linear(name: str, outputs: int, inputs: int, bias: float = 0.0) -> None:
        weight = drawn(outputs, inputs, scale=(2.0 / inputs) ** 0.5)
        # Rows of mean 0: else what all spans share after a ReLU decides, and one class wins everywhere.
        weights[f"{name}.weight"] = weight - weight.mean(dim=1, keepdim=True)
        weights[f"{name}.bias"] = drawn(outputs, scale=0.1) + bias

    def layers(name: str, inputs: int) -> None:
        linear(f"{name}._linear_layers.0", width, inputs)
        linear(f"{name}._linear_layers.1", width, width)

    ner, relation = f"{model}__ner_labels", f"{model}__relation_labels"
    layers(f"_ner._ner_scorers.{ner}.0._module", span)
    linear(f"_ner._ner_scorers.{ner}.1._module", len(NER[model]), width, ner_bias)
    for pruner in (f"_relation._mention_pruners.{relation}", "_coref._mention_pruner"):
        layers(f"{pruner}._scorer.0._module", span)
        linear(f"{pruner}._scorer.1._module", 1, width)
    layers(f"_relation._relation_feedforwards.{relation}", 3 * span)
    linear(f"_relation._relation_scorers.{relation}", len(RELATIONS), width, relation_bias)
    layers("_coref._antecedent_feedforward._module", 3 * span + FEATURES)
    linear("_coref._antecedent_scorer._module", 1, width)
    linear("_coref._f_network._linear_layers.0", span, 2 * span)
    return weights


def _pieces() -> list[str]:
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *WORDS.split(), *signs, *".,:-/()!?;%'", *(f"##{sign}" for sign in signs)]))


def _bert_tokenizer(folder: Path) -> int:
    """As the published encoders have it: a word list and a short configuration."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(_pieces()) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    )
    return len(_pieces())


def _modern_tokenizer(folder: Path) -> int:
    """A tokenizer.json, with the case kept."""
    folder.mkdir(parents=True)
    vocabulary = {piece: number for number, piece in enumerate(_pieces())}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)
