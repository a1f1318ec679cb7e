"""What runs inside vLLM's worker, colocated or in a server: takes the policy's weights, says whose it has.

vLLM mixes this class into its worker where `--worker-extension-cls` (or `worker_extension_cls`) names it, and importing
this module is what makes its weights exchangeable on a CPU.
"""

from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch
import vllm.model_executor.layers.utils as layers
from vllm.platforms import current_platform

from unirg.rollout.vllm_inputs import vllm_version
from unirg.rollout.weights import receive_weights


def _plain_linear(layer: torch.nn.Module, remove_weight: bool = False) -> None:
    layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]


if current_platform.is_cpu():
    # vLLM repacks linear weights for its CPU kernels and drops the originals: nothing could be loaded a second time.
    layers.dispatch_cpu_unquantized_gemm = _plain_linear


class WeightReceiver:
    """Methods that `collective_rpc` reaches. The names are not to meet those of vLLM's worker."""

    model_runner: Any
    vllm_config: Any
    unirg_version: str | None = None
    """The version of the weights in place; None for those that the engine was started with, or an update that is not
    done."""

    def unirg_describe(self) -> dict[str, Any]:
        """What a trainer must know before it samples here."""
        model = self.vllm_config.model_config
        return {
            "version": self.unirg_version,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "architecture": model.architecture,
            "vllm": vllm_version(),
        }

    def unirg_fetch(self, host: str, port: int, token: str, timeout: float) -> dict[str, Any]:
        """Loads the weights that the trainer streams from this address. Returns what `unirg_load` does, or `torn` where
        the stream broke off, or `refused` where they are not the model's, with the reason.

        Nothing is raised: where one worker of several raises, vLLM leaves the others' answers in their queues, and
        takes each for the answer to the call after it from then on.
        """
        try:
            with closing(receive_weights(host, port, token, timeout)) as weights:
                return self.unirg_load(weights)
        except OSError as error:
            return {"torn": str(error) or type(error).__name__, "missing": []}
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}

    def unirg_load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        """Loads weights under Hugging Face names, one at a time. Returns the parameters that none of them filled, which
        stayed as they were: those must be none. The weights have no version until the trainer names them."""
        self.unirg_version = None
        model = self.model_runner.model
        filled: set[str] = set()
        for name, tensor in weights:
            filled |= model.load_weights([(name, tensor)]) or set()
        return {"missing": [name for name, _ in model.named_parameters() if name not in filled]}

    def unirg_name(self, version: str) -> dict[str, Any]:
        """Gives the weights in place their version: they are whole, and nothing is left of what others computed."""
        self.unirg_version = version
        return {"version": version}
