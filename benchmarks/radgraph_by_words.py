"""RadGraph F1's way of matching on the entities of the project's report reader: a stand-in, for the probes.

    unirg rewards check benchmarks/radgraph_by_words.py:radgraph_by_words

Two entities of RadGraph F1 agree where their words do. Which words a RadGraph model would mark is for its weights to
say; how they are compared is not, and that is what this shows: `radgraph_f1`'s own arithmetic at level `partial`, on
annotations that have the mentions' words as they are written, and their sides, places and severities as further
entities that are related to them. Its figures are not RadGraph's.
"""

from typing import Any

from unirg.extraction import extract
from unirg_rewards.radgraph_f1 import annotation_f1

LABELS = {
    "positive": "Observation::definitely present",
    "negative": "Observation::definitely absent",
    "uncertain": "Observation::uncertain",
}


def radgraph_by_words(candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
    """Words of findings, sides, places and severities, matched as RadGraph F1 (partial) matches entities."""
    return [
        annotation_f1(annotation(candidate), annotation(reference), "partial") if reference.strip() else None
        for candidate, reference in zip(candidates, references, strict=True)
    ]


def annotation(report: str) -> dict[str, dict[str, Any]]:
    """The reader's mentions in the form of radgraph's annotations: entities by number, with words, label, relations."""
    entities: list[dict[str, Any]] = []
    for mention in extract(report):
        finding = {"tokens": " ".join(mention.text.split()), "label": LABELS[mention.polarity], "relations": []}
        entities.append(finding)
        number = str(len(entities))
        if mention.severity:
            modifies = [["modify", number]]
            entities.append({"tokens": mention.severity, "label": finding["label"], "relations": modifies})
        for words in filter(None, (mention.side, mention.place)):
            entities.append({"tokens": words, "label": "Anatomy::definitely present", "relations": []})
            finding["relations"].append(["located_at", str(len(entities))])
    return {str(number): entity for number, entity in enumerate(entities, 1)}
