import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign

from maskcast.builder.network.network import ROI_LEVELS
from maskcast.builder.network.roi_align import AlignedMultiScaleRoIAlign
from maskcast.builder.training.pooling import pool_regions

HEIGHT, WIDTH = 96, 128

# Coordinates reach beyond the image, corners may touch.
corners = st.tuples(
    st.floats(-20, WIDTH + 20, width=32),
    st.floats(-20, HEIGHT + 20, width=32),
    st.floats(0, WIDTH + 20, width=32),
    st.floats(0, HEIGHT + 20, width=32),
).map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))


def features(channels: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, channels, HEIGHT // stride, WIDTH // stride, generator=generator)
        for name, stride in zip(ROI_LEVELS, (4, 8, 16, 32), strict=True)
    }


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("kind", [MultiScaleRoIAlign, AlignedMultiScaleRoIAlign])
@given(boxes=st.lists(corners, min_size=1, max_size=12), split=st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_regions_and_gradients_are_those_of_torchvisions_roi_align(
    kind: type[MultiScaleRoIAlign], size: int, boxes: list[tuple[float, ...]], split: int
) -> None:
    pooler = kind(list(ROI_LEVELS), size, 2)
    of_images = [torch.tensor(part).reshape(-1, 4) for part in (boxes[:split], boxes[split:])]
    levels = {name: level.requires_grad_() for name, level in features().items()}
    results = []
    for pool in (pooler, lambda *arguments: pool_regions(pooler, *arguments)):
        regions = pool(levels, of_images, [(HEIGHT, WIDTH)] * 2)
        weights = torch.linspace(-1, 1, regions.numel()).reshape(regions.shape)
        results.append((regions, torch.autograd.grad(regions, list(levels.values()), weights)))
    (theirs, their_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=2e-4)


def test_features_in_bfloat16_are_summed_in_float32() -> None:
    levels = {name: level.bfloat16() for name, level in features().items()}
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 60.0]]), torch.zeros(0, 4)]
    pooler = MultiScaleRoIAlign(list(ROI_LEVELS), 7, 2)
    regions = pool_regions(pooler, levels, boxes, [(HEIGHT, WIDTH)] * 2)
    exact = pooler({k: v.float() for k, v in levels.items()}, boxes, [(HEIGHT, WIDTH)] * 2)
    assert regions.dtype == torch.float32
    torch.testing.assert_close(regions, exact, rtol=1e-4, atol=1e-4)
