"""Models: the graphs of a bundle, read when they are needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import openvino as ov

from maskcast.engines.bundle import Bundle
from maskcast.engines.openvino.operators import read_graph

MASKS, HEATMAPS = "masks", "heatmaps"
"""Outputs of the graphs that take boxes: the segmenter's and the poser's."""


class Models:
    """A bundle's graphs, which OpenVINO reads when they are needed, and their precision.

    Args:
        bundle: whose portable graphs are read.
        precision: "f32" or "bf16".
        pose: read the poser too.

    Attributes:
        outputs: "masks" and "heatmaps", if there is a graph for them.
    """

    def __init__(self, bundle: Bundle, precision: str, *, pose: bool = False) -> None:
        self._bundle = bundle
        self.precision = precision
        graphs = {MASKS: bundle.segmenter, HEATMAPS: bundle.poser if pose else None}
        self._paths = {output: path for output, path in graphs.items() if path is not None}
        self.outputs = tuple(self._paths)

    @property
    def paths(self) -> list[Path]:
        """The files of the graphs."""
        return [self._bundle.detector, *self._paths.values()]

    @cached_property
    def detector(self) -> ov.Model:
        """Images to boxes and features."""
        return read_graph(self._bundle.detector)

    @cached_property
    def of_boxes(self) -> dict[str, ov.Model]:
        """Features and boxes to masks or heatmaps, by output."""
        return {output: read_graph(path) for output, path in self._paths.items()}

    def read(self) -> None:
        """Read the graphs now.

        Raises:
            InputError: OpenVINO cannot read them.
        """
        _ = self.detector, self.of_boxes
