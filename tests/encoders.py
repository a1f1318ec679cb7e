"""Tiny encoders with random weights, in exactly the files that the published ones come in: CheXbert's checkpoint beside
bert-base-uncased's folder, and a RoBERTa folder as BERTScore takes it, with its baseline file."""

import string
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertModel, BertTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

REPORTS = (
    "Small left pleural effusion. No pneumothorax.",
    "Mild cardiomegaly. Lungs are clear.",
    "Endotracheal tube and enteric tube are in place.",
    "No acute cardiopulmonary process.",
    "Patchy right lower lobe consolidation,\nlikely pneumonia (new).",
    "Bibasilar atelectasis.  Heart size is 3.5 cm larger.",
    "HEART SIZE NORMAL",
)
ODD = (
    "effusion",
    ".",
    "  leading and   inner   blanks ",
    "tabs\tand\r\nnewlines\n\n",
    "naïve café – 3×4 µm",
    "肺部清晰",
    "🫁 clear",
    "no\x00null\x07bell",
    "[SEP] effusion [CLS] <s> </s> <mask>",
    "effusion " * 700,
    "x" * 3000,
)
"""Texts that a policy may write and a tokenizer may stumble on; none is blank."""
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = sorted({word for report in REPORTS for word in report.lower().replace(".", " ").split()})


def widen(model: torch.nn.Module) -> None:
    """Draw the weights wide, so that texts differ in more than rounding."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "LayerNorm" not in name:
                tensor.normal_(0, 0.3)


def chexbert_folder(folder: Path, layers: int = 2) -> Path:
    """`folder` with chexbert.pth and bert-base-uncased/, both as published, the latter without weights."""
    torch.manual_seed(0)
    marks = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *marks, *(f"##{mark}" for mark in marks)]
    vocabulary += [word for word in WORDS if word.isalpha() and word not in vocabulary]
    bert = folder / "bert-base-uncased"
    bert.mkdir(parents=True)
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(bert / "vocab.txt"), do_lower_case=True, model_max_length=512).save_pretrained(bert)
    config = BertConfig(vocab_size=len(vocabulary), num_hidden_layers=layers, **SIZES)
    config.save_pretrained(bert)
    model = torch.nn.Module()
    model.bert = BertModel(config)
    width = SIZES["hidden_size"]
    model.linear_heads = torch.nn.ModuleList(torch.nn.Linear(width, outputs) for outputs in (4,) * 13 + (2,))
    widen(model)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]  # as releases of its time saved it
    # The published file also holds what its training stopped with.
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, folder / "chexbert.pth")
    return folder


def roberta_folder(folder: Path, layers: int = 3) -> Path:
    """`folder` as a RoBERTa model of Hugging Face's, with a byte-level vocabulary and `baseline.tsv`."""
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([*REPORTS] * 3, vocab_size=400, special_tokens=special, show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    positions = 130  # RoBERTa's table is two longer than its longest text
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        type_vocab_size=1,
        **SIZES,
    )
    model = RobertaModel(config)
    widen(model)
    model.save_pretrained(folder)
    lines = [f"{layer},0.1{layer},0.2{layer},0.3{layer}" for layer in range(layers + 1)]
    (folder / "baseline.tsv").write_text("\n".join(["LAYER,P,R,F", *lines]) + "\n", encoding="utf-8")
    return folder
