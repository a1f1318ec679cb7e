"""The published models of RaTEScore: a DeBERTa tagger for entities, an MPNet encoder for their strings.

Sentences are cut by a rule (upstream: medspaCy's PyRuSH, whose release needs older numpy), after which each
sentence is tagged on its own, as upstream does. Results are kept per sentence and per string: reports repeat both.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

SENTENCE_TOKENS = 512
STRING_TOKENS = 30
BATCH = 32
CACHE = 50_000  # sentences, and strings, remembered; all are forgotten when there are more
_BREAK = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


class OfficialModels:
    """Entities and embeddings from two model folders or hub ids. Loaded by `setup`, or when first needed."""

    def __init__(self, ner: str, embedder: str, device: str | None = None) -> None:
        self.ner, self.embedder, self.device = ner, embedder, device
        self._tagger: Any = None
        self._entities: dict[str, list[tuple[str, str]]] = {}
        self._vectors: dict[str, np.ndarray] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Both models, and their commits where they came from a hub."""
        named: dict[str, Any] = {"ner": self.ner, "embedder": self.embedder, "sentences": "rule"}
        if self._tagger is not None:
            named["ner_commit"] = getattr(self._tagger.config, "_commit_hash", None)
            named["embedder_commit"] = getattr(self._encoder.config, "_commit_hash", None)
        return named

    def setup(self) -> None:
        """Load both models. Raises OSError naming a folder or hub id that cannot be loaded."""
        if self._tagger is not None:
            return
        import torch
        from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._ner_tokenizer: Any = AutoTokenizer.from_pretrained(self.ner)
        self._string_tokenizer: Any = AutoTokenizer.from_pretrained(self.embedder)
        self._encoder: Any = AutoModel.from_pretrained(self.embedder).eval().to(self.device)
        self._tagger = AutoModelForTokenClassification.from_pretrained(self.ner).eval().to(self.device)

    def entities(self, reports: list[str]) -> list[list[tuple[str, str]]]:
        """(string, type) of every entity, report by report, in the text's order."""
        self.setup()
        sentences = [split_sentences(report) for report in reports]
        if len(self._entities) > CACHE:
            self._entities.clear()
        new = sorted({text for texts in sentences for text in texts} - self._entities.keys(), key=len)
        for start in range(0, len(new), BATCH):
            self._tag(new[start : start + BATCH])
        return [[entity for text in texts for entity in self._entities[text]] for texts in sentences]

    def embed(self, strings: list[str]) -> np.ndarray:
        """One vector (E) per string: the last layer's first token."""
        import torch

        self.setup()
        if len(self._vectors) > CACHE:
            self._vectors.clear()
        new = [string for string in dict.fromkeys(strings) if string not in self._vectors]
        for start in range(0, len(new), BATCH):
            chunk = new[start : start + BATCH]
            encoded = self._string_tokenizer(
                chunk, truncation=True, padding=True, return_tensors="pt", max_length=STRING_TOKENS
            ).to(self.device)
            with torch.inference_mode():
                vectors_NE = self._encoder(**encoded).last_hidden_state[:, 0, :].float().cpu().numpy()
            self._vectors.update(zip(chunk, vectors_NE, strict=True))
        return np.stack([self._vectors[string] for string in strings])

    def _tag(self, sentences: list[str]) -> None:
        import torch

        tokenizer = self._ner_tokenizer
        encoded = tokenizer(
            sentences, max_length=SENTENCE_TOKENS, padding=True, truncation=True, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            best_BT = self._tagger(**encoded).logits.argmax(dim=2).tolist()
        names = self._tagger.config.id2label
        for sentence, ids, best, mask in zip(
            sentences, encoded["input_ids"].tolist(), best_BT, encoded["attention_mask"].tolist(), strict=True
        ):
            tokens: list[str] = tokenizer.convert_ids_to_tokens(ids[: sum(mask)])
            spans = entity_spans(tokens, [names[index] for index in best])
            self._entities[sentence] = [
                (tokenizer.convert_tokens_to_string(tokens[first : last + 1]), kind) for first, last, kind in spans
            ]


def split_sentences(report: str) -> list[str]:
    """Sentences of three characters or more."""
    return [sentence for piece in _BREAK.split(report) if len(sentence := piece.strip()) >= 3]


def entity_spans(tokens: Sequence[str], labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first token, last token, type) of the entities, from one label per token, by upstream's reading of B-, I-, O.

    It looks one label ahead, that of [SEP] after the last word. A `B-` followed by `I-` opens an entity, which keeps
    that type; an `I-` followed by `B-` or `O` closes it; a `B-` followed by anything else is an entity of one token; an
    `I-` that nothing opened is no entity. Upstream's quirk is kept: what a sentence leaves open is an entity only if
    nothing had ended since the last `O` (its `end` is reset nowhere else).
    """
    spans: list[tuple[int, int, str]] = []
    start: int | None = None
    end: int | None = None
    kind = ""
    for here in range(min(len(tokens), len(labels) - 1)):
        label, ahead = labels[here], labels[here + 1][:1]
        if tokens[here] in ("[CLS]", "[SEP]") or label == "O":
            continue
        if label[0] == "B" and ahead == "I":
            start, kind = here, label[2:]
        elif ahead in ("B", "O"):
            if label[0] == "B":
                spans.append((here, here, label[2:]))
            elif start is not None:
                spans.append((start, here, kind))
            start, end, kind = (here, here, label[2:]) if ahead == "B" else (None, None, "")
    if start is not None and end is None:
        spans.append((start, len(tokens) - 2, kind))
    return spans
