"""Batch norms that the keypoint branch has only while it is trained.

Eight convolutions in a row learn slowly without them (Ioffe and Szegedy, "Batch Normalization",
2015). They are folded into the convolutions of the saved model, which is the network that
``build_network`` builds.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

_HEAD = "roi_heads.keypoint_head."
_EPSILON = 1e-5


class FittedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that does not change its first batch, so that it can extend a trained branch.

    Its scale and shift start from the statistics of that batch (data-dependent initialisation, as
    in Salimans and Kingma 2016, section 3).
    """

    def forward(self, values: Tensor) -> Tensor:
        """Normalise ``[N, C, H, W]``."""
        if self.training and not self.num_batches_tracked:
            assert self.running_mean is not None
            assert self.running_var is not None
            with torch.no_grad():
                variance, mean = torch.var_mean(values.float(), (0, 2, 3), correction=0)
                self.weight.copy_((variance + self.eps).sqrt())
                self.bias.copy_(mean)
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        return super().forward(values)


def add_norms(head: Any) -> None:
    """Put a batch norm behind each convolution of torchvision's ``KeypointRCNNHeads``, in place."""
    for index, layer in enumerate(head):
        if isinstance(layer, nn.Conv2d):
            norm = FittedBatchNorm2d(layer.out_channels, _EPSILON)
            head[index] = nn.Sequential(OrderedDict(conv=layer, norm=norm))


def fold_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's state in which the norms are part of their convolutions."""
    folded = {}
    for name, value in state.items():
        layer, _, parameter = name.rpartition(".conv.")
        if name.startswith(_HEAD) and ".norm." in name:
            continue
        if name.startswith(_HEAD) and layer:
            weight, bias, mean, variance = (
                state[f"{layer}.norm.{part}"]
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            factor = weight / (variance + _EPSILON).sqrt()
            if parameter == "weight":
                value = value * factor[:, None, None, None]
            else:
                value = (value - mean) * factor + bias
            name = f"{layer}.{parameter}"
        folded[name] = value
    return folded
