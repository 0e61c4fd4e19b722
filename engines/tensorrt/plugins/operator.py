"""The detection operators as TensorRT needs them: shapes, types, workspace and launches. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from maskcast.engines.tensorrt.plugins import launch
from maskcast.engines.tensorrt.plugins.launch import FloatType, Launch

NAMESPACE = "maskcast"
VERSION = "1"
"""Namespace and version under which TensorRT knows the plugins; a plan records the version."""

ElementType = Literal["f32", "f16", "i32"]


class Tensor(NamedTuple):
    """A tensor on the device."""

    pointer: int
    shape: tuple[int, ...]
    dtype: ElementType


class Operator(ABC):
    """One operator with its attributes, which are the fields of the dataclass that derives."""

    name: ClassVar[str]
    input_types: ClassVar[tuple[tuple[ElementType, ...], ...]]
    """Element types that each input may have."""

    @abstractmethod
    def output_type(self, inputs: Sequence[Any]) -> ElementType | Any:
        """Give the output's element type, from those of the inputs."""

    @abstractmethod
    def output_shape(self, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Give the output's shape. Dimensions of inputs may be numbers or symbols."""

    @abstractmethod
    def check(self, inputs: Sequence[Sequence[int]]) -> None:
        """Raise ValueError where the kernels cannot take inputs of these (largest) shapes."""

    def accepts(self, position: int, types: Sequence[ElementType]) -> bool:
        """Say whether a tensor (inputs, then the output) may have its type, given those before."""
        if position < len(self.input_types):
            return types[position] in self.input_types[position]
        return types[position] == self.output_type(types[: len(self.input_types)])

    def workspace_bytes(self, inputs: Sequence[Sequence[int]]) -> int:
        """Device memory needed beside inputs and output."""
        del inputs
        return 0

    @abstractmethod
    def launches(self, inputs: Sequence[Tensor], output: Tensor, workspace: int) -> list[Launch]:
        """Give the kernel launches that compute the output."""


@dataclass(frozen=True, slots=True)
class MultiscaleRoiAlign(Operator):
    """P2..P5, rois ``[R, 4]``, batch_index ``[R]`` -> ``[R, C, output_size, output_size]``."""

    name: ClassVar[str] = "MultiscaleRoiAlign"
    input_types: ClassVar[tuple[tuple[ElementType, ...], ...]] = (
        *((("f32", "f16"),) * 4),
        ("f32",),
        ("i32",),
    )

    output_size: int = 7
    sampling_ratio: int = 2
    aligned: int = 0

    def __post_init__(self) -> None:
        if self.sampling_ratio < 1 or not 1 <= self.output_size * self.sampling_ratio <= 64:
            raise ValueError(
                "MultiscaleRoiAlign: sampling_ratio must be 1 or more and output_size times "
                f"sampling_ratio at most {launch.MAX_TAPS}"
            )

    def accepts(self, position: int, types: Sequence[ElementType]) -> bool:
        """As the base class; and all four levels have one type."""
        if 0 < position < 4 and types[position] != types[0]:
            return False
        return Operator.accepts(self, position, types)

    def output_type(self, inputs: Sequence[Any]) -> Any:
        """Give the features' type."""
        return inputs[0]

    def output_shape(self, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Give boxes by channels by cells."""
        return [inputs[4][0], inputs[0][1], self.output_size, self.output_size]

    def check(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse what the grid of a launch cannot hold."""
        if inputs[0][1] > 65535:
            raise ValueError("MultiscaleRoiAlign: more than 65535 channels")

    def launches(self, inputs: Sequence[Tensor], output: Tensor, workspace: int) -> list[Launch]:
        """One launch; none where there are no boxes."""
        del workspace
        levels, (rois, batch_index) = inputs[:4], inputs[4:]
        boxes = rois.shape[0]
        if boxes == 0:
            return []
        dtype: FloatType = "f16" if levels[0].dtype == "f16" else "f32"
        task = launch.roi_align(
            [level.pointer for level in levels],
            [(level.shape[2], level.shape[3]) for level in levels],
            rois.pointer,
            batch_index.pointer,
            output.pointer,
            images=levels[0].shape[0],
            boxes=boxes,
            channels=levels[0].shape[1],
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            aligned=bool(self.aligned),
            dtype=dtype,
        )
        return [task]


@dataclass(frozen=True, slots=True)
class GroupedNms(Operator):
    """Boxes ``[B, N, 4]``, scores and groups ``[B, N]`` -> kept indices ``[B, max_output]``."""

    name: ClassVar[str] = "GroupedNms"
    input_types: ClassVar[tuple[tuple[ElementType, ...], ...]] = (("f32",), ("f32",), ("i32",))

    iou_threshold: float = 0.5
    score_threshold: float = 0.0
    max_output: int = 100

    def __post_init__(self) -> None:
        if self.max_output < 1:
            raise ValueError("GroupedNms: max_output must be 1 or more")

    def output_type(self, inputs: Sequence[Any]) -> ElementType:
        """Give int32, the type of indices."""
        del inputs
        return "i32"

    def output_shape(self, inputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Give images by ``max_output``."""
        return [inputs[0][0], self.max_output]

    def check(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse more candidates than the kernels' shared memory holds bits for."""
        candidates = inputs[0][1]
        if candidates > launch.MAX_CANDIDATES:
            raise ValueError(
                f"GroupedNms: {candidates} candidates an image; the most is {launch.MAX_CANDIDATES}"
            )

    def workspace_bytes(self, inputs: Sequence[Sequence[int]]) -> int:
        """Count the overlap bits and the candidates in order."""
        return launch.nms_workspace_bytes(inputs[0][0], inputs[0][1])

    def launches(self, inputs: Sequence[Tensor], output: Tensor, workspace: int) -> list[Launch]:
        """Rank, overlap, select."""
        boxes, scores, groups = inputs
        return launch.grouped_nms(
            boxes.pointer,
            scores.pointer,
            groups.pointer,
            output.pointer,
            workspace,
            images=boxes.shape[0],
            candidates=boxes.shape[1],
            max_output=self.max_output,
            iou_threshold=self.iou_threshold,
            score_threshold=self.score_threshold,
        )


OPERATORS: tuple[type[Operator], ...] = (MultiscaleRoiAlign, GroupedNms)
