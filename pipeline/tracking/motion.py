"""Motion: predicts the box of one object with a Kalman filter.

Uses plain numbers instead of arrays: nearly all frames show a few objects, and one call to NumPy
costs more than all the arithmetic for one object.
"""

from __future__ import annotations

import math
from typing import NamedTuple

BOX_STD = 0.05
"""Standard deviation of the centre and the sides of a detected box, in sizes of the object."""

SPEED_CHANGE_STD = (0.7, 0.7, 0.3, 0.3)
"""Standard deviation of the change of speed within one second, of the centre (x, y) and the sides
(width, height), in sizes / s. It grows with the square root of the time."""

INITIAL_SPEED_STD = (1.5, 1.5, 0.3, 0.3)
"""Standard deviation of the speed of a new object, in sizes / s."""

SPEED_DECAY_S = (2.0, 2.0, 0.4, 0.4)
"""Time in which speeds decay to 1/e without a new detection."""

TOLERANCE = 0.1
"""Deviation of a box that is always tolerated, in sizes of the object."""

MAX_DEVIATIONS = 5.0
"""Number of standard deviations beyond which a box does not belong to the object."""

SHRINK_STD, GROWTH_STD = 0.6, 0.3
"""Tolerated change of a side, in sides of the object: parts of the object may be hidden."""

HIDDEN_SHARE = 0.1
"""A box with a side that is shorter by this share is partly hidden by another object."""

BORDER_PX = 2.0
"""An edge of a box within this many pixels of the frame's edge is cut off by it."""

Box = tuple[float, float, float, float]
"""x1 y1 x2 y2, pixels."""

Size = tuple[float, float]
"""Width and height, pixels."""


class Step(NamedTuple):
    """The effect of a time step on the four numbers of a box: centre x, centre y, width, height.

    Attributes:
        terms: for each number, the distance that a speed of 1 covers while it decays, in seconds;
            the factor by which the speed decays; and the increase of the variance of the number,
            of its covariance with the speed, and of the variance of the speed, in sizes squared.
    """

    terms: tuple[tuple[float, float, float, float, float], ...]

    @classmethod
    def of(cls, seconds: float) -> Step:
        """Return the step of a time in seconds."""
        terms = []
        for decay_s, change in zip(SPEED_DECAY_S, SPEED_CHANGE_STD, strict=True):
            decay, variance = math.exp(-seconds / decay_s), change**2
            noise = (variance * seconds**3 / 3, variance * seconds**2 / 2, variance * seconds)
            terms.append((decay_s * (1 - decay), decay, *noise))
        return cls(tuple(terms))


class Motion:
    """A Kalman filter for one object: the centre and the sides of its box, and their speeds.

    Times are in seconds, so dropped frames do not matter. The four numbers of a box are filtered
    independently, so each has a covariance of three numbers. Noise is relative to the object's
    size, which is the square root of its box's area.

    Args:
        box: the first box; the initial speed is 0.

    Attributes:
        state: centre x, centre y, width, height, pixels.
        speed: speed of each of them, pixels / s.
    """

    __slots__ = ("_covariance", "_speed_variance", "_variance", "speed", "state")

    def __init__(self, box: Box) -> None:
        x1, y1, x2, y2 = box
        self.state = [(x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 1.0), max(y2 - y1, 1.0)]
        self.speed = [0.0] * 4
        area = self.state[2] * self.state[3]
        self._variance = [BOX_STD**2 * area] * 4
        self._covariance = [0.0] * 4  # of state and speed
        self._speed_variance = [std**2 * area for std in INITIAL_SPEED_STD]

    @property
    def box(self) -> Box:
        """The estimated box."""
        x, y, width, height = self.state
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def predict(self, step: Step) -> None:
        """Advance the estimate by a time step."""
        state, speed = self.state, self.speed
        variance, covariance = self._variance, self._covariance
        speed_variance = self._speed_variance
        for k, (reach, decay, _, _, _) in enumerate(step.terms):
            state[k] += reach * speed[k]
            speed[k] *= decay
        state[2], state[3] = max(state[2], 1.0), max(state[3], 1.0)
        area = state[2] * state[3]
        for k, (reach, decay, noise, cross_noise, speed_noise) in enumerate(step.terms):
            spread = reach * speed_variance[k]
            variance[k] += reach * (2 * covariance[k] + spread) + noise * area
            covariance[k] = decay * (covariance[k] + spread) + cross_noise * area
            speed_variance[k] = decay * decay * speed_variance[k] + speed_noise * area

    def reach(self) -> Size:
        """Return how far from the centre, in x and y, a box of the object may be, pixels.

        A box with all of its area outside this distance certainly does not belong to the object.
        """
        _, _, width, height = self.state
        tolerance = TOLERANCE**2 * width * height
        return (
            MAX_DEVIATIONS * math.sqrt(self._variance[0] + tolerance) + width / 2,
            MAX_DEVIATIONS * math.sqrt(self._variance[1] + tolerance) + height / 2,
        )

    def distance(self, box: Box, frame: Size) -> float:
        """Return the squared distance of a box from the object, in standard deviations.

        A box that is smaller than the object is compared at its nearest edges, because the rest may
        be hidden. For a box of the object the expected value is 2. Beyond ``MAX_DEVIATIONS``
        squared, the value is only a lower bound.

        Args:
            box: the box.
            frame: size of the frame.
        """
        squares = 0.0
        tolerance = TOLERANCE**2 * self.state[2] * self.state[3]
        for k in (0, 1):
            moved, grown, edge = self._compare(k, box, frame)
            if edge and grown > 0:
                grown = 0.0  # it enters the frame
            side_std = (SHRINK_STD if grown < 0 else GROWTH_STD) * self.state[k + 2]
            squares += moved**2 / (self._variance[k] + tolerance)
            squares += grown**2 / (self._variance[k + 2] + side_std**2)
            if squares > MAX_DEVIATIONS**2:
                break
        return squares

    def correct(self, box: Box, frame: Size) -> None:
        """Update the estimate with a detected box.

        Args:
            box: the box.
            frame: size of the frame.
        """
        state = self.state
        residual, noise = [0.0] * 4, [1.0] * 4
        for k in (0, 1):
            moved, grown, edge = self._compare(k, box, frame)
            if edge and grown > 0:  # more of the object is visible: it did not grow
                state[k] -= edge * grown / 2
                state[k + 2] += grown
                grown = 0.0
            residual[k], residual[k + 2] = moved, grown
            if edge:
                noise[k], noise[k + 2] = 2.0, 10.0 if grown < 0 else 1.0
        box_variance = BOX_STD**2 * state[2] * state[3]
        variance, covariance = self._variance, self._covariance
        speed_variance = self._speed_variance
        for k in range(4):
            total = variance[k] + box_variance * noise[k] ** 2
            gain, speed_gain = variance[k] / total, covariance[k] / total
            state[k] += gain * residual[k]
            self.speed[k] += speed_gain * residual[k]
            speed_variance[k] -= speed_gain * covariance[k]
            variance[k] *= 1 - gain
            covariance[k] *= 1 - gain

    def _compare(self, k: int, box: Box, frame: Size) -> tuple[float, float, int]:
        """Return by how much the object has moved and grown if this is its box, pixels.

        If a box is cut off by the frame or hidden by another object, the visible edge shows the
        motion, and the visible part of the side says little about the size.

        Args:
            k: 0 for x, 1 for y.
            box: the box.
            frame: size of the frame.

        Returns:
            The motion of the centre, the growth of the side, and which edge they are based on: -1
            for the low edge, 1 for the high edge, 0 for both, if the whole side is visible.
        """
        centre, side = self.state[k], self.state[k + 2]
        low, high = box[k] - (centre - side / 2), box[k + 2] - (centre + side / 2)
        grown = high - low
        is_cut_low, is_cut_high = box[k] <= BORDER_PX, box[k + 2] >= frame[k] - BORDER_PX
        is_hidden = grown < -HIDDEN_SHARE * side
        if not is_cut_low and (is_cut_high or (is_hidden and abs(low) < abs(high))):
            return low, grown, -1
        if not is_cut_high and (is_cut_low or is_hidden):
            return high, grown, 1
        return (low + high) / 2, grown, 0
