"""Linear layers through oneDNN: the same float32 product, on many CPUs much faster than the default library."""

import torch
from torch import nn


class OneDnnLinear(nn.Module):
    """Stands for a `torch.nn.Linear` in inference on CPU. Its weights are packed once and are no parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
        self._weight, self._bias = linear.weight.detach().to_mkldnn(), bias.detach().to_mkldnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], float32."""
        flat = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(flat.to_mkldnn(), self._weight, self._bias).to_dense()
        return y.view(*x.shape[:-1], -1)


def use_onednn(model: nn.Module) -> nn.Module:
    """Replaces every float32 `nn.Linear` of a CPU model, in place, where torch has oneDNN; for inference only.

    Sums run in another order than in the default library: values agree to float32 rounding.
    """
    if torch.backends.mkldnn.is_available():
        for name, child in model.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(model, name, OneDnnLinear(child))
            else:
                use_onednn(child)
    return model
