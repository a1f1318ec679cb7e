"""Random-weight folders in the format of RaTEScore's published models: a DeBERTa-v3 tagger of 11 labels, and an MPNet.

Configurations and tokenizer files are written by hand as they are published, so that transformers 4 and 5 read them
alike; weights come from numpy's generator, so that one seed gives one archive everywhere. They are drawn wide, so that
labels change from word to word; `o_bias` makes entities rarer.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram, WordPiece
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from tests.radgraph_archives import WORDS

KINDS = ["ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY"]


def write_tagger(
    folder: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    layer_scale: float = 1.0,
    o_bias: float = 0.5,
    buckets: int = 256,
) -> Path:
    """A folder with a DebertaV2ForTokenClassification in the shape of deberta-v3-base. Many layers need a small
    `layer_scale`, or all words become alike."""
    folder.mkdir(parents=True)
    labels = ["O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI")]
    config = {
        "architectures": ["DebertaV2ForTokenClassification"],
        "model_type": "deberta-v2",
        "vocab_size": _unigram_tokenizer(folder),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "relative_attention": True,
        "position_buckets": buckets,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pad_token_id": 0,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(folder))
    weights = _drawn(model, layer_scale)
    weights["classifier.weight"] *= 4 / layer_scale
    weights["classifier.bias"] = torch.tensor([o_bias] + [0.0] * 10)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_embedder(
    folder: Path, *, hidden: int = 32, layers: int = 2, heads: int = 2, layer_scale: float = 1.0
) -> Path:
    """A folder with an MPNetModel in the shape of mpnet-base."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MPNetModel"],
        "model_type": "mpnet",
        "vocab_size": _wordpiece_tokenizer(folder),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "relative_attention_num_buckets": 32,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    save_file(_drawn(model, layer_scale), folder / "model.safetensors", {"format": "pt"})
    return folder


def _drawn(model: torch.nn.Module, layer_scale: float) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    weights = {}
    for name, value in model.state_dict().items():
        if "LayerNorm" in name:
            weights[name] = torch.full(value.shape, float(name.endswith("weight")))
        elif not name.endswith("position_ids"):
            wide = 1.0 if "embeddings" in name else layer_scale / value.shape[-1] ** 0.5
            scale = 0.2 if value.dim() == 1 else wide
            weights[name] = torch.from_numpy((rng.standard_normal(value.shape) * scale).astype(np.float32))
    return weights


def _unigram_tokenizer(folder: Path) -> int:
    """SentencePiece's kind, case kept: words of WORDS whole, all else by letters. Returns the vocabulary's size."""
    words = list(dict.fromkeys(WORDS.split()))
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("▁", -4.0)]
    pieces += [("▁" + form, -5.0) for word in words for form in dict.fromkeys((word, word.capitalize()))]
    pieces += [(letter, -9.0) for letter in map(chr, range(33, 127)) if not letter.isspace()]
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = zip(("pad", "cls", "sep", "unk", "mask"), special, strict=True)
    settings = {f"{name}_token": token for name, token in names} | {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    settings |= {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "vocab_type": "spm"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def _wordpiece_tokenizer(folder: Path) -> int:
    words = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *dict.fromkeys(WORDS.split())]
    words += [mark + letter for mark in ("", "##") for letter in map(chr, range(33, 127)) if not letter.isupper()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    settings = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>"}
    settings |= {"unk_token": "[UNK]", "mask_token": "<mask>", "tokenizer_class": "MPNetTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
    return len(vocabulary)
