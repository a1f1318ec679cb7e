"""`unirg rollout-server`: vLLM's own server, with what a trainer needs of it."""

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch

from unirg.errors import UserError

EXTENSION = "unirg.rollout.vllm_worker.WeightReceiver"


def command(model: str, options: Sequence[str], cuda: bool) -> tuple[list[str], dict[str, str]]:
    """The command that starts the server, and what its environment must say. `options` are vLLM's own and come last,
    where they outdo the others. Raises UserError for those that weights cannot reach."""
    given = {option.partition("=")[0].replace("_", "-") for option in options}  # vLLM takes either
    if copies := sorted(option for option in given if option == "-dp" or option.startswith("--data-parallel")):
        raise UserError(
            f"{copies[0]}: vLLM's copies of a model behind one address answer for each other, and weights would reach "
            "only one; start a server for each, and name them all in rollout.vllm.servers"
        )
    flags = {
        "--host": ["127.0.0.1"],  # it loads weights from whoever asks: others reach it where the caller says so
        "--worker-extension-cls": [EXTENSION],
        "--logprobs-mode": ["processed_logprobs"],
        "--generation-config": ["vllm"],
        "--mm-processor-cache-gb": ["0"],  # each prompt comes with its own pixels
        "--enable-scale-out": [],  # /inference/v1/generate: token ids and pixels in, token ids out
    }
    if not cuda:
        # By itself vLLM turns float32 into bfloat16. A prompt that is read in parts has its draw undone, which torch's
        # generators cannot do on a CPU: the engine would die of it.
        flags |= {"--dtype": ["float32"], "--enforce-eager": [], "--no-enable-chunked-prefill": []}
    ours = [text for flag, value in flags.items() if flag not in given for text in (flag, *value)]
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *ours, *options]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not cuda:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return start, environment


def serve(model: str, options: Sequence[str]) -> int:
    """Becomes the server: this process is replaced by vLLM's. Raises UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("rollout-server: vLLM is not installed in this environment; pip install 'unirg[vllm]'")
    start, environment = command(model, options, torch.cuda.is_available())
    os.execvpe(start[0], start, environment | os.environ)
