import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskcast.engines.instances.masks import (
    MASK_SIZE,
    PACKED_BYTES,
    crop_crossings,
    fill_crossings,
    pack_crops,
    unpack_crops,
)


@st.composite
def crops(draw):
    """Crops from smooth blobs to noise, and with only the values 0 and 255."""
    cells = draw(st.sampled_from([1, 2, 5, 9, 28]))
    seed = draw(st.integers(0, 2**32 - 1))
    coarse = torch.from_numpy(np.random.default_rng(seed).random((1, 1, cells, cells)))
    fine = torch.nn.functional.interpolate(coarse, (MASK_SIZE, MASK_SIZE), mode="bilinear")
    crop = np.rint(fine[0, 0].numpy() * 255).astype(np.uint8)
    return crop if draw(st.booleans()) else np.where(crop > 127, 255, 0).astype(np.uint8)


@st.composite
def boxes_in_images(draw):
    """A box that may lie on the border, be a pixel or nothing, or (rarely) lie outside."""
    width, height = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    slack = draw(st.sampled_from([0, 0, 0, 30]))

    def side(size):
        ends = st.floats(-slack, size + slack, width=32) | st.integers(-slack, size + slack)
        return sorted((draw(ends), draw(ends)))

    (x1, x2), (y1, y2) = side(width), side(height)
    return np.array([x1, y1, x2, y2], dtype=np.float32), width, height


def paste_mask(crop, box, width, height):
    return fill_crossings(crop_crossings(crop, box, width, height))


def whole(patch, width, height):
    image = np.zeros((height, width), dtype=bool)
    rows, columns = patch.pixels.shape
    assert 0 <= patch.x0 <= patch.x0 + columns <= width
    assert 0 <= patch.y0 <= patch.y0 + rows <= height
    image[patch.y0 : patch.y0 + rows, patch.x0 : patch.x0 + columns] = patch.pixels
    return image


def torchvision_probability(crop, box, width, height):
    masks = torch.from_numpy(crop)[None, None].float() / 255
    return paste_masks_in_image(masks, torch.from_numpy(box)[None], (height, width))[0, 0].numpy()


def meets(box, width, height):
    """Return whether the box meets the image, as torchvision expands it; else torchvision fails."""
    patch = torch.zeros(1, 1, MASK_SIZE, MASK_SIZE)
    try:
        paste_masks_in_image(patch, torch.from_numpy(box)[None], (height, width))
    except RuntimeError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(crop=crops(), place=boxes_in_images())
def test_a_pasted_mask_has_the_pixels_that_torchvision_gives(crop, place):
    box, width, height = place
    mine = whole(paste_mask(crop, box, width, height), width, height)
    if not meets(box, width, height):
        assert not mine.any()
        return
    probability = torchvision_probability(crop, box, width, height)
    differs = mine != (probability > 0.5)
    # Pixels may differ only where the probability is 0.5 within the precision of float32.
    assert np.all(np.abs(probability[differs] - 0.5) < 1e-4)


def test_masks_of_ordinary_size_are_nearly_those_of_torchvision():
    rng = np.random.default_rng(0)
    for _ in range(100):
        coarse = torch.from_numpy(rng.random((1, 1, 5, 5)))
        fine = torch.nn.functional.interpolate(coarse, (MASK_SIZE, MASK_SIZE), mode="bilinear")
        crop = np.rint(fine[0, 0].numpy() * 255).astype(np.uint8)
        corner = rng.uniform(0, 100, 2)
        box = np.concatenate([corner, corner + rng.uniform(20, 100, 2)]).astype(np.float32)
        mine = whole(paste_mask(crop, box, 200, 200), 200, 200)
        theirs = torchvision_probability(crop, box, 200, 200) > 0.5
        assert (mine & theirs).sum() >= 0.99 * (mine | theirs).sum() > 0


def test_a_patch_is_no_larger_than_its_box_and_a_border():
    crop = np.full((MASK_SIZE, MASK_SIZE), 255, dtype=np.uint8)
    patch = paste_mask(crop, np.array([500, 300, 600, 340], dtype=np.float32), 4000, 3000)
    assert patch.pixels.shape[0] <= 43
    assert patch.pixels.shape[1] <= 103


@pytest.mark.parametrize(
    "box", [[-50, 10, -20, 30], [120, 10, 150, 30], [10, -90, 40, -60], [10, 400, 40, 500]]
)
def test_a_box_outside_the_image_has_no_pixels(box):
    crop = np.full((MASK_SIZE, MASK_SIZE), 255, dtype=np.uint8)
    assert not paste_mask(crop, np.array(box, dtype=np.float32), 100, 80).pixels.size


@pytest.mark.parametrize("box", [[10, 20, 10, 20], [10, 20, 10.5, 20.5], [0, 0, 1, 1]])
def test_a_box_of_a_pixel_or_less_has_a_few_pixels(box):
    crop = np.full((MASK_SIZE, MASK_SIZE), 255, dtype=np.uint8)
    mask = whole(paste_mask(crop, np.array(box, dtype=np.float32), 64, 64), 64, 64)
    assert 1 <= mask.sum() <= 4


def test_an_empty_crop_has_no_pixels():
    crop = np.full((MASK_SIZE, MASK_SIZE), 127, dtype=np.uint8)
    box = np.array([0, 0, 50, 50], dtype=np.float32)
    assert not paste_mask(crop, box, 100, 100).pixels.size


@settings(max_examples=50, deadline=None)
@given(crop=crops(), place=boxes_in_images())
def test_the_pixels_of_a_patch_are_contiguous(crop, place):
    assert paste_mask(crop, *place).pixels.flags.c_contiguous


@given(st.lists(crops(), max_size=3))
@settings(max_examples=30, deadline=None)
def test_packed_crops_keep_which_cells_are_the_object(some):
    stack = np.array(some, dtype=np.uint8).reshape(-1, MASK_SIZE, MASK_SIZE)
    packed = pack_crops(stack)
    assert packed.shape == (len(some), PACKED_BYTES)
    assert packed.nbytes == 98 * len(some)
    assert np.array_equal(unpack_crops(packed), np.where(stack >= 128, 255, 0))


def test_a_packed_crop_begins_with_the_high_bit_of_the_top_left_cell():
    crop = np.zeros((1, MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    crop[0, 0, 0] = crop[0, 0, 9] = 200
    assert pack_crops(crop)[0, :2].tolist() == [0b10000000, 0b01000000]
