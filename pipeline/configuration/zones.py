"""ZoneConfig and LineConfig: polygons and lines in a source's frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

RegionName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Point = tuple[float, float]

MAX_REGIONS = 32
"""Maximum number of zones of a source, and of lines."""

MAX_POINTS = 64
"""Maximum number of corners of a zone."""


class ZoneConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A polygon that instances enter and leave.

    Attributes:
        name: its name in events, counts and metrics.
        polygon: its corners in order, x and y as fractions (0..1) of the frame's width and height,
            from the top left; the first corner is not repeated.
        labels: names of the classes that count; all by default.
        min_overlap: share of an instance's mask that must be inside, above 0 to 1.
        anchor: ``feet``: an instance is inside if the lowest point of its mask is.
    """

    name: RegionName
    polygon: Annotated[tuple[Point, ...], Meta(min_length=3, max_length=MAX_POINTS)]
    labels: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    min_overlap: Annotated[float, Meta(gt=0, le=1)] = 0.5
    anchor: Literal["feet"] | None = None

    def __post_init__(self) -> None:
        _check_points(f"zone {self.name!r}", self.polygon)
        if crossing := _crossing(self.polygon):
            a, b = crossing
            raise ValueError(
                f"zone {self.name!r}: the edges from corner {a} and from corner {b} meet; give the "
                "corners in order around the zone"
            )


class LineConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A line that instances cross.

    Attributes:
        name: its name in events, counts and metrics.
        points: both ends, in the units of a zone's corners. *forward* is to the left of the
            direction from the first to the second as seen on screen: a line from top to bottom is
            crossed forward by objects that move right.
        labels: names of the classes that count; all by default.
        direction: which crossings count.
    """

    name: RegionName
    points: tuple[Point, Point]
    labels: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    direction: Literal["both", "forward", "backward"] = "both"

    def __post_init__(self) -> None:
        _check_points(f"line {self.name!r}", self.points)
        if self.points[0] == self.points[1]:
            raise ValueError(f"line {self.name!r}: both points are the same; give two")


def check_regions(zones: Sequence[ZoneConfig], lines: Sequence[LineConfig]) -> None:
    """Check the zones and lines of one source.

    Raises:
        ValueError: there are too many, or two have the same name.
    """
    for kind, regions in (("zone", zones), ("line", lines)):
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} {kind}s: a source has at most {MAX_REGIONS}")
        names = [region.name for region in regions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two {kind}s are named {name!r}; give each its own name")


def _check_points(what: str, points: Sequence[Point]) -> None:
    for x, y in points:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(
                f"{what}: the point [{x:g}, {y:g}] is outside the frame; give fractions of its "
                "width and height, 0 to 1"
            )


def _crossing(polygon: Sequence[Point]) -> tuple[int, int] | None:
    """Return two edges that meet elsewhere than at a shared corner; None if there are none.

    An edge is given by the number of its first corner, from 1. Successive edges share a corner;
    they meet elsewhere if one leads back along the other.
    """
    count = len(polygon)
    edges = [(polygon[i], polygon[(i + 1) % count]) for i in range(count)]
    for i, (a, b) in enumerate(edges):
        if a == b:
            return i + 1, (i + 1) % count + 1
        for j in range(i + 1, count):
            c, d = edges[j]
            if j == i + 1 or (i == 0 and j == count - 1):
                middle, before, after = (b, a, d) if j == i + 1 else (a, b, c)
                meets = _turn(before, middle, after) == 0 and _between(before, middle, after)
            else:
                meets = _meet(a, b, c, d)
            if meets:
                return i + 1, j + 1
    return None


def _turn(a: Point, b: Point, c: Point) -> float:
    """Return a number above 0 if a, b, c turn clockwise on screen, below 0 if counter-clockwise."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _between(a: Point, middle: Point, b: Point) -> bool:
    """Tell whether two edges on one line lead from ``middle`` in the same direction."""
    first = (a[0] - middle[0], a[1] - middle[1])
    second = (b[0] - middle[0], b[1] - middle[1])
    return first[0] * second[0] + first[1] * second[1] > 0


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Tell whether the segments a-b and c-d have a point in common."""
    turns = _turn(a, b, c), _turn(a, b, d), _turn(c, d, a), _turn(c, d, b)
    if turns[0] * turns[1] < 0 and turns[2] * turns[3] < 0:
        return True
    ends = ((a, b, c), (a, b, d), (c, d, a), (c, d, b))
    return any(turn == 0 and _on(*three) for turn, three in zip(turns, ends, strict=True))


def _on(p: Point, q: Point, point: Point) -> bool:
    """Tell whether a point on the line through p and q is between them."""
    return all(min(p[k], q[k]) <= point[k] <= max(p[k], q[k]) for k in (0, 1))
