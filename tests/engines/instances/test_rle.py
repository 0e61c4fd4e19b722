import numpy as np
import pytest
from faster_coco_eval import mask as coco
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.instances.masks import Crossings, fill_crossings
from maskcast.engines.instances.rle import compress_runs, decode_runs, decompress_runs, encode_runs


@st.composite
def images(draw):
    """Bool images from empty to full, from speckles to blocks that reach every border."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    image = np.zeros((height, width), dtype=bool)
    for _ in range(draw(st.integers(0, 4))):
        y1, y2 = sorted((draw(st.integers(0, height)), draw(st.integers(0, height))))
        x1, x2 = sorted((draw(st.integers(0, width)), draw(st.integers(0, width))))
        image[y1:y2, x1:x2] ^= True
    if draw(st.booleans()):
        seed = draw(st.integers(0, 2**32 - 1))
        image ^= np.random.default_rng(seed).random((height, width)) < 0.1
    return image


def crossings_of(image):
    """Find crossings the plain way: where a pixel differs from the one above it."""
    column, row = np.nonzero(np.diff(np.pad(image, ((1, 1), (0, 0))).astype(int), axis=0).T)
    return Crossings(column, row)


def theirs(image):
    return coco.encode(np.asfortranarray(image.astype(np.uint8)))["counts"]


def mine(image):
    height, width = image.shape
    return compress_runs([encode_runs(crossings_of(image), width, height)])[0]


@settings(max_examples=300, deadline=None)
@given(image=images())
def test_counts_equal_those_of_coco_byte_for_byte(image):
    assert mine(image) == theirs(image)


@settings(max_examples=100, deadline=None)
@given(image=images())
def test_counts_decode_to_the_same_pixels(image):
    height, width = image.shape
    x0, y0, pixels = decode_runs(decompress_runs(theirs(image), width * height), width, height)
    full = np.zeros_like(image)
    full[y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
    assert np.array_equal(full, image)
    if pixels.size:
        assert all(side.any() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@settings(max_examples=100, deadline=None)
@given(image=images())
def test_filled_crossings_are_the_image(image):
    x0, y0, pixels = fill_crossings(crossings_of(image))
    full = np.zeros_like(image)
    full[y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
    assert np.array_equal(full, image)


def test_many_masks_compress_as_each_alone_does():
    rng = np.random.default_rng(1)
    some = [rng.random((37, 53)) < p for p in (0, 0.01, 0.5, 1)]
    runs = [encode_runs(crossings_of(image), 53, 37) for image in some]
    assert compress_runs(runs) == [theirs(image) for image in some]
    assert compress_runs([]) == []


def test_runs_of_an_image_as_large_as_the_wire_allows_survive():
    side = 16384
    runs = np.array([side * side - 5, 3, 2], dtype=np.int64)
    (counts,) = compress_runs([runs])
    assert np.array_equal(decompress_runs(counts, side * side), runs)


@pytest.mark.parametrize(
    "counts",
    [
        b"",
        b"\x00",
        b"P",
        b"o",
        b"1~",
        b"`" * 8 + b"0",
        b"5",
        b"d01",
        b"00000000",
        b"N4",
        b"\xff\xff",
    ],
    ids=repr,
)
def test_counts_that_do_not_fill_the_image_are_refused(counts):
    with pytest.raises(ValueError, match=r"counts|runs"):
        decompress_runs(counts, 20)


@settings(max_examples=500, deadline=None)
@given(counts=st.binary(max_size=40), pixels=st.integers(1, 4000))
def test_any_bytes_are_counts_or_refused(counts, pixels):
    try:
        runs = decompress_runs(counts, pixels)
    except ValueError:
        return
    assert runs.sum() == pixels
    assert runs.min() >= 0
    decode_runs(runs, pixels, 1)
