"""Motion: where an object will be after some seconds.

Plain numbers instead of arrays: nearly all frames show a few objects, and a call of numpy costs
more than all numbers of one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

MEASURED = 0.05
"""Standard deviation of a box's centre and sides as they are detected, in sizes of the object."""

JOLTS = (0.7, 0.7, 0.3, 0.3)
"""How much the speed of the centre (x, y) and of the sides (width, height) changes within a second:
standard deviation, sizes / s; over other times with their square root."""

FIRST_SPEED = (1.5, 1.5, 0.3, 0.3)
"""Of an object that was seen once: standard deviation, sizes / s."""

SPEED_LASTS_S = (2.0, 2.0, 0.4, 0.4)
"""Without a new detection, speeds fade to 1/e in this time."""

TOLERATED = 0.1
"""How far a box may be off before it counts as unlikely, in sizes of the object."""

MOST_DEVIATIONS = 5.0
"""Deviations beyond which a box is not the object."""

SHRINKS, GROWS = 0.6, 0.3
"""Likewise its sides, in sides of the object: parts of it may be hidden."""

HIDDEN = 0.1
"""A box whose side is shorter by this share is partly hidden by another object."""

BORDER = 2.0
"""An edge of a box within this many pixels of the frame's edge is cut off by it."""

Box = tuple[float, float, float, float]
"""x1 y1 x2 y2, pixels."""

Size = tuple[float, float]
"""Width and height, pixels."""


class Step(NamedTuple):
    """What the time between two frames does to each of the four numbers of a box.

    Attributes:
        numbers: how far a speed of 1 carries while it fades, what is left of a speed, and by how
            much the variances of the number, of both, and of the speed grow, sizes squared.
    """

    numbers: tuple[tuple[float, float, float, float, float], ...]

    @classmethod
    def of(cls, seconds: float) -> Step:
        """Return the step of a time."""
        numbers = []
        for lasts_s, jolts in zip(SPEED_LASTS_S, JOLTS, strict=True):
            left, jolt = math.exp(-seconds / lasts_s), jolts**2
            grows = (jolt * seconds**3 / 3, jolt * seconds**2 / 2, jolt * seconds)
            numbers.append((lasts_s * (1 - left), left, *grows))
        return cls(tuple(numbers))


class Motion:
    """A Kalman filter for one object: centre and sides of its box, and their speeds.

    Time is in seconds, so it does not matter how many frames were dropped. The four numbers of a
    box are filtered apart from each other, so a covariance is three numbers for each. Noise is
    relative to the object's size, the root of its box's area.

    Args:
        box: where it was seen first; it stands still.

    Attributes:
        state: centre x, centre y, width, height, pixels.
        speed: of each of them, pixels / s.
    """

    __slots__ = ("_both", "_place", "_quick", "speed", "state")

    def __init__(self, box: Box) -> None:
        x1, y1, x2, y2 = box
        self.state = [(x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 1.0), max(y2 - y1, 1.0)]
        self.speed = [0.0] * 4
        area = self.state[2] * self.state[3]
        # Variances of the state, of both, of the speed.
        self._place = [MEASURED**2 * area] * 4
        self._both = [0.0] * 4
        self._quick = [first**2 * area for first in FIRST_SPEED]

    @property
    def box(self) -> Box:
        """Where the object is believed to be."""
        x, y, width, height = self.state
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def predict(self, step: Step) -> None:
        """Move the object on."""
        state, speed = self.state, self.speed
        place, both, quick = self._place, self._both, self._quick
        for k, (reach, left, _, _, _) in enumerate(step.numbers):
            state[k] += reach * speed[k]
            speed[k] *= left
        state[2], state[3] = max(state[2], 1.0), max(state[3], 1.0)
        area = state[2] * state[3]
        for k, (reach, left, more_place, more_both, more_quick) in enumerate(step.numbers):
            spread = reach * quick[k]
            place[k] += reach * (2 * both[k] + spread) + more_place * area
            both[k] = left * (both[k] + spread) + more_both * area
            quick[k] = left * left * quick[k] + more_quick * area

    def reach(self) -> Size:
        """Return how far apart, in x and y, the object and a box of no size may be.

        A box that is farther, by more than half its sides, is certainly not the object.
        """
        _, _, width, height = self.state
        tolerated = TOLERATED**2 * width * height
        return (
            MOST_DEVIATIONS * math.sqrt(self._place[0] + tolerated) + width / 2,
            MOST_DEVIATIONS * math.sqrt(self._place[1] + tolerated) + height / 2,
        )

    def distance(self, box: Box, frame: Size) -> float:
        """Return how unlikely a box is to be the object, squared deviations.

        A box that is smaller than the object is compared at its nearest edges, because the rest may
        be hidden. The expected value for the right box is 2. Beyond ``MOST_DEVIATIONS`` squared it
        is not computed to the end.
        """
        squares = 0.0
        tolerated = TOLERATED**2 * self.state[2] * self.state[3]
        for k in (0, 1):
            moved, grown, edge = self._compare(k, box, frame)
            if edge and grown > 0:
                grown = 0.0  # it comes into the frame
            allowed = (SHRINKS if grown < 0 else GROWS) * self.state[k + 2]
            squares += moved**2 / (self._place[k] + tolerated)
            squares += grown**2 / (self._place[k + 2] + allowed**2)
            if squares > MOST_DEVIATIONS**2:
                break
        return squares

    def correct(self, box: Box, frame: Size) -> None:
        """Learn from a detection."""
        state = self.state
        apart, noise = [0.0] * 4, [1.0] * 4
        for k in (0, 1):
            moved, grown, edge = self._compare(k, box, frame)
            if edge and grown > 0:  # more of the object has come into the frame: it did not grow
                state[k] -= edge * grown / 2
                state[k + 2] += grown
                grown = 0.0
            apart[k], apart[k + 2] = moved, grown
            if edge:
                noise[k], noise[k + 2] = 2.0, 10.0 if grown < 0 else 1.0
        measured = MEASURED**2 * state[2] * state[3]
        place, both, quick = self._place, self._both, self._quick
        for k in range(4):
            total = place[k] + measured * noise[k] ** 2
            place_gain, speed_gain = place[k] / total, both[k] / total
            state[k] += place_gain * apart[k]
            self.speed[k] += speed_gain * apart[k]
            quick[k] -= speed_gain * both[k]
            place[k] *= 1 - place_gain
            both[k] *= 1 - place_gain

    def _compare(self, k: int, box: Box, frame: Size) -> tuple[float, float, int]:
        """Return by how much the object has moved and grown if this is its box, pixels.

        Where a box is cut off, by the frame or by another object, the visible edge shows the
        motion, and the visible part of a side says little about the size.

        Args:
            k: 0 for x, 1 for y.
            box: the box.
            frame: size of the frame.

        Returns:
            The way of the centre, the growth of the side, and the edge that tells: -1 the low one,
            1 the high one, 0 both since the box is whole.
        """
        centre, side = self.state[k], self.state[k + 2]
        low, high = box[k] - (centre - side / 2), box[k + 2] - (centre + side / 2)
        grown = high - low
        is_cut_low, is_cut_high = box[k] <= BORDER, box[k + 2] >= frame[k] - BORDER
        is_hidden = grown < -HIDDEN * side
        if not is_cut_low and (is_cut_high or (is_hidden and abs(low) < abs(high))):
            return low, grown, -1
        if not is_cut_high and (is_cut_low or is_hidden):
            return high, grown, 1
        return (low + high) / 2, grown, 0
