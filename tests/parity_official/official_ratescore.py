"""The official RaTEScore package in a process of its own: JSON in, JSON out, no import of this project.

    python official_ratescore.py < request.json > answer.json

Request: `package` (`RaTEScore`, or `radeval` for the copy in RadEval), the folders `ner` and `embedder`, `weights`
(`long` or `short`), the lists `candidates` and `references`, and `texts`, none without a sentence. Answer: `scores` of
the pairs, `sentences` and `entities` of the texts, `cpu_seconds` of the scoring call, `versions`.
"""

import contextlib
import json
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # the package prints
        from loguru import logger

        logger.remove()  # its sentence splitter writes a line for every token, which would be most of the time
        package = {"RaTEScore": "RaTEScore", "radeval": "radeval.metrics.RaTEScore"}[request["package"]]
        scorer, ner, utils = (import_module(f"{package}.{name}") for name in ("scorer", "score", "utils"))
        rate = scorer.RaTEScore(
            bert_model=request["ner"],
            eval_model=request["embedder"],
            use_gpu=False,
            affinity_matrix=request["weights"],
        )
        sentences = [utils.sentence_split([text])[0] for text in request["texts"]]
        entities = []
        if request["texts"]:
            entities = ner.run_ner(request["texts"], rate.idx2label, rate.tokenizer, rate.model, rate.device, 1)
        started = time.process_time()
        scores = rate.compute_score(request["candidates"], request["references"])
        seconds = time.process_time() - started
    scores = scores[0] if isinstance(scores, tuple) else scores  # RadEval's copy answers entities too
    names = ("RaTEScore", "radeval", "medspacy", "PyRuSH", "transformers", "torch")
    answer = {"scores": [float(score) for score in scores], "sentences": sentences, "entities": entities}
    answer |= {"cpu_seconds": seconds, "versions": {name: installed(name) for name in names}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
