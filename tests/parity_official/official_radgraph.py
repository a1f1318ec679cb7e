"""The official radgraph package, or RadEval's copy, in a process of its own: JSON in, JSON out.

    python official_radgraph.py < request.json > answer.json

It imports nothing of this project. Request: `package` (`radgraph` or `radeval`), `folder` (holds `<model>/`), `model`,
and the lists `candidates` and `references`, none blank but for "".
Answer: `rewards`, the lists of simple, partial and complete; `candidates` and `references`, the annotations of the
pairs in which neither report is ""; `cpu_seconds` of the scoring call; `versions`.
"""

import contextlib
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def with_ends(self: Any, ids: list[int]) -> list[int]:
    return [self.cls_token_id, *ids, self.sep_token_id]


def encode_plus(self: Any, text: str, text_pair: str | None = None, **options: Any) -> Any:
    return self(text, text_pair, **options)


def main() -> None:
    # What radgraph 0.1.18 calls and transformers 5 no longer has.
    for name, method in (("encode_plus", encode_plus), ("build_inputs_with_special_tokens", with_ends)):
        if not hasattr(PreTrainedTokenizerBase, name):
            setattr(PreTrainedTokenizerBase, name, method)
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # the package prints
        if request["package"] == "radeval":
            import radeval

            sys.modules["RadEval"] = radeval  # its modules import one another by this name
            from radeval.metrics.radgraph import F1RadGraph
        else:
            from radgraph import F1RadGraph

        options = {"model_type": request["model"], "model_cache_dir": request["folder"], "cuda": -1}
        scorer = F1RadGraph(reward_level="all", **options)
        started = time.process_time()
        _, rewards, candidates, references = scorer(refs=request["references"], hyps=request["candidates"])
        seconds = time.process_time() - started
    answer = {"rewards": rewards, "candidates": candidates, "references": references, "cpu_seconds": seconds}
    answer["versions"] = {name: version(name) for name in (request["package"], "transformers", "torch")}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
