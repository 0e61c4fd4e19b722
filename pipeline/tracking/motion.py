"""Motion: where objects will be after some seconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEASURED = 0.05
"""Standard deviation of a box's centre and sides as they are detected, in sizes of the object."""

JOLTS = np.array([0.7, 0.7, 0.3, 0.3])
"""How much the speed of the centre (x, y) and of the sides (width, height) changes within a second:
standard deviation, sizes / s; over other times with their square root."""

FIRST_SPEED = np.array([1.5, 1.5, 0.3, 0.3])
"""Of an object that was seen once: standard deviation, sizes / s."""

SPEED_LASTS_S = np.array([2.0, 2.0, 0.4, 0.4])
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

Rows = NDArray[np.bool_] | NDArray[np.intp]


class Motion:
    """A Kalman filter for each of T objects: centre and sides of its box, and their speeds.

    Time is in seconds, so it does not matter how many frames were dropped. The four numbers of a
    box are filtered apart from each other: a covariance is three numbers for each, and all objects
    are moved at once. Noise is relative to an object's size, the root of its box's area.

    Attributes:
        frame: ``[2]`` width and height of the frame, pixels.
        state: ``[T, 4]`` centre x, centre y, width, height, pixels.
        speed: ``[T, 4]`` pixels / s.
    """

    def __init__(self) -> None:
        self.frame = np.zeros(2)
        self.state = np.zeros((0, 4))
        self.speed = np.zeros((0, 4))
        self._variance = np.zeros((3, 0, 4))  # of the state, of both, of the speed

    def __len__(self) -> int:
        return len(self.state)

    def boxes(self) -> NDArray[np.float64]:
        """Return where the objects are believed to be: ``[T, 4]`` x1 y1 x2 y2."""
        half = self.state[:, 2:] / 2
        return np.hstack([self.state[:, :2] - half, self.state[:, :2] + half])

    def predict(self, seconds: float) -> None:
        """Move all objects on."""
        fading = np.exp(-seconds / SPEED_LASTS_S)
        reach = SPEED_LASTS_S * (1 - fading)  # how far a speed of 1 carries while it fades
        self.state = self.state + reach * self.speed
        self.state[:, 2:] = np.maximum(self.state[:, 2:], 1)
        self.speed = fading * self.speed
        place, both, speed = self._variance
        jolt = (JOLTS * self._sizes()) ** 2
        self._variance = np.stack(
            [
                place + 2 * reach * both + reach**2 * speed + jolt * seconds**3 / 3,
                fading * (both + reach * speed) + jolt * seconds**2 / 2,
                fading**2 * speed + jolt * seconds,
            ]
        )

    def distances(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how unlikely each box is to be each object: ``[T, N]``, squared deviations.

        A box that is smaller than the object is compared at its nearest edges, because the rest may
        be hidden. The expected value for the right box is 2; values that are certainly above
        ``MOST_DEVIATIONS`` squared are infinite.

        Args:
            boxes: ``[N, 4]`` x1 y1 x2 y2.
        """
        place = self._variance[0, :, :2] + (TOLERATED * self._sizes()) ** 2
        reach = MOST_DEVIATIONS * np.sqrt(place) + self.state[:, 2:] / 2
        measured = _measure(boxes)
        apart = np.abs(measured[None, :, :2] - self.state[:, None, :2])
        near = (apart <= reach[:, None] + measured[None, :, 2:] / 2).all(axis=2)
        t, n = np.nonzero(near)  # of all others one term alone is beyond the limit
        moved, grown, by = self._compare(self.state[t], boxes[n])
        allowed = np.where(grown < 0, SHRINKS, GROWS) * self.state[t, 2:]
        side = self._variance[0, t, 2:] + allowed**2
        grown = np.where((by != 0) & (grown > 0), 0, grown)  # it comes into the frame
        squares = np.full(near.shape, np.inf)
        squares[t, n] = (moved**2 / place[t] + grown**2 / side).sum(axis=1)
        return squares

    def correct(self, rows: NDArray[np.intp], boxes: NDArray[np.float64]) -> None:
        """Learn from detections.

        Args:
            rows: ``[M]`` which objects were detected.
            boxes: ``[M, 4]`` x1 y1 x2 y2.
        """
        moved, grown, by = self._compare(self.state[rows], boxes)
        partial = by != 0
        # More of the object has come into the frame: it did not grow by itself.
        appeared = np.where(partial & (grown > 0), grown, 0)
        self.state[rows] += np.hstack([-by * appeared / 2, appeared])
        grown -= appeared
        apart = np.hstack([moved, grown])
        noise = np.hstack([1.0 + partial, np.where(partial & (grown < 0), 10.0, 1.0)])
        place, both, speed = self._variance[:, rows]
        total = place + (MEASURED * self._sizes()[rows] * noise) ** 2
        place_gain, speed_gain = place / total, both / total
        self.state[rows] += place_gain * apart
        self.speed[rows] += speed_gain * apart
        self._variance[:, rows] = (
            place * (1 - place_gain),
            both * (1 - place_gain),
            speed - speed_gain * both,
        )

    def add(self, boxes: NDArray[np.float64]) -> None:
        """Begin with new objects, standing still: ``[M, 4]`` x1 y1 x2 y2."""
        state = _measure(boxes)
        size = np.sqrt(state[:, 2:].prod(axis=1))[:, None]
        new = np.stack(
            [
                (MEASURED * size * np.ones(4)) ** 2,
                np.zeros_like(state),
                (FIRST_SPEED * size) ** 2,
            ]
        )
        self.state = np.vstack([self.state, state])
        self.speed = np.vstack([self.speed, np.zeros_like(state)])
        self._variance = np.concatenate([self._variance, new], axis=1)

    def keep(self, rows: Rows) -> None:
        """Forget all other objects."""
        self.state, self.speed = self.state[rows], self.speed[rows]
        self._variance = self._variance[:, rows]

    def _compare(
        self, state: NDArray[np.float64], boxes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int8]]:
        """Return by how much objects have moved and grown if these are their boxes, pixels.

        Where a box is cut off, by the frame or by another object, the visible edge shows the
        motion, and the visible part of a side says little about the size.

        Args:
            state: ``[..., 4]``, of each object.
            boxes: ``[..., 4]`` x1 y1 x2 y2.

        Returns:
            ``[..., 2]`` each, for x and y: the way of the centre, the growth of the side, and the
            edge that tells: -1 the low one, 1 the high one, 0 both since the box is whole.
        """
        half = state[..., 2:] / 2
        low = boxes[..., :2] - (state[..., :2] - half)
        high = boxes[..., 2:] - (state[..., :2] + half)
        grown = high - low
        cut_low, cut_high = boxes[..., :2] <= BORDER, boxes[..., 2:] >= self.frame - BORDER
        hidden = grown < -HIDDEN * state[..., 2:]
        by_low = ~cut_low & (cut_high | (hidden & (np.abs(low) < np.abs(high))))
        by_high = ~cut_high & ~by_low & (cut_low | hidden)
        moved = np.where(by_low, low, np.where(by_high, high, (low + high) / 2))
        return moved, grown, by_high.astype(np.int8) - by_low.astype(np.int8)

    def _sizes(self) -> NDArray[np.float64]:
        sizes: NDArray[np.float64] = np.sqrt(self.state[:, 2:].prod(axis=1))[:, None]
        return sizes


def _measure(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn boxes x1 y1 x2 y2 into centres and sides, of a pixel at least."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1)
    return np.hstack([(boxes[:, :2] + boxes[:, 2:]) / 2, sides])
