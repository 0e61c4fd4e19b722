"""Masks on the wire: encodes and decodes part 3 of an ``instances`` message."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances, PolygonMasks, RleMasks
from maskcast.engines.instances.masks import MASK_SIZE, PACKED_BYTES, pack_crops, unpack_crops
from maskcast.engines.instances.rle import decompress_runs

MaskFormat = Literal["crop_u8", "crop_bits", "coco_rle", "polygon", "none"]
"""The format of part 3; docs/wire.md describes the layouts."""

CROP_BYTES = MASK_SIZE * MASK_SIZE


class WireError(ValueError):
    """A message is malformed; the text says in which way."""


def encode_masks(instances: Instances, mask_format: MaskFormat) -> bytes:
    """Encode the masks of a frame as part 3 of a message.

    Raises:
        WireError: there are no masks, or they cannot be converted to this format.
    """
    if mask_format == "none":
        return b""
    if instances.masks is None:
        raise WireError(f"there are no masks to encode as {mask_format}")
    if mask_format == "coco_rle":
        counts = instances.counts()
        return np.array([len(c) for c in counts], dtype="<u4").tobytes() + b"".join(counts)
    if mask_format == "polygon":
        return _encode_polygons([instances.polygons(i) for i in range(len(instances))])
    if not isinstance(instances.masks, np.ndarray):
        raise WireError(f"the masks are not crops, so they cannot be encoded as {mask_format}")
    return (instances.masks if mask_format == "crop_u8" else pack_crops(instances.masks)).tobytes()


def decode_masks(
    part: bytes, mask_format: MaskFormat, count: int, width: int, height: int
) -> NDArray[np.uint8] | RleMasks | PolygonMasks | None:
    """Decode part 3 of a message.

    Args:
        part: the part.
        mask_format: its format.
        count: number of instances.
        width: width of the frame, pixels.
        height: height of the frame, pixels.

    Returns:
        Crops, ``[count, 28, 28]`` uint8, for the formats with crops; None for "none".

    Raises:
        WireError: the part is malformed.
    """
    match mask_format:
        case "none":
            return None
        case "crop_u8":
            crops = _bytes_each(part, count, CROP_BYTES)
            return crops.reshape(count, MASK_SIZE, MASK_SIZE)
        case "crop_bits":
            return unpack_crops(_bytes_each(part, count, PACKED_BYTES))
        case "coco_rle":
            return _decode_rle(part, count, width * height)
        case "polygon":
            return _decode_polygons(part, count, width, height)


def _bytes_each(part: bytes, count: int, size: int) -> NDArray[np.uint8]:
    if len(part) != count * size:
        raise WireError(f"{len(part)} bytes of masks for {count} instances of {size} bytes")
    return np.frombuffer(part, dtype=np.uint8).reshape(count, size)


def _numbers(part: bytes, offset: int, count: int) -> NDArray[np.int64]:
    """Read ``count`` little-endian uint32 at ``offset``."""
    if len(part) < offset + 4 * count:
        raise WireError(f"{len(part)} bytes of masks end inside a table")
    return np.frombuffer(part, dtype="<u4", count=count, offset=offset).astype(np.int64)


def _decode_rle(part: bytes, count: int, pixels: int) -> RleMasks:
    lengths = _numbers(part, 0, count)
    if 4 * count + int(lengths.sum()) != len(part):
        raise WireError("the lengths of the run-length codes do not fill the part")
    ends = (4 * count + np.cumsum(lengths)).tolist()
    counts = (
        tuple(bytes(part[a:b]) for a, b in zip([4 * count, *ends[:-1]], ends, strict=True))
        if count
        else ()
    )
    try:
        for code in counts:
            decompress_runs(code, pixels)
    except ValueError as error:
        raise WireError(f"a run-length code is malformed: {error}") from error
    return RleMasks(counts)


def _encode_polygons(polygons: list[list[NDArray[np.float32]]]) -> bytes:
    rings = [ring for polygon in polygons for ring in polygon]
    table = [len(polygon) for polygon in polygons] + [len(ring) for ring in rings]
    points = b"".join(ring.astype("<f4").tobytes() for ring in rings)
    return np.array(table, dtype="<u4").tobytes() + points


def _decode_polygons(part: bytes, count: int, width: int, height: int) -> PolygonMasks:
    rings_each = _numbers(part, 0, count)
    rings = int(rings_each.sum())
    points_each = _numbers(part, 4 * count, rings)
    start, points = 4 * (count + rings), int(points_each.sum())
    if start + 8 * points != len(part):
        raise WireError("the numbers of points do not fill the part")
    if np.any(points_each < 3):
        raise WireError("a ring has fewer than 3 points")
    xy = (
        np.frombuffer(part, dtype="<f4", offset=start).reshape(points, 2)
        if points
        else (np.zeros((0, 2), dtype=np.float32))
    )
    if not np.all((xy >= 0) & (xy <= np.array([width, height], dtype=np.float32))):
        raise WireError("a point is outside the frame")
    all_rings = np.split(xy, np.cumsum(points_each)[:-1]) if rings else []
    ends = np.cumsum(rings_each).tolist()
    return PolygonMasks(
        tuple(tuple(all_rings[b - n : b]) for n, b in zip(rings_each.tolist(), ends, strict=True))
    )
