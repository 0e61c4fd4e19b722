"""The graphs as torch modules on a GPU: with the shipped kernels, in a CUDA graph, in the engine.

Steps of ``benchmarks.gpu_kernels``, which need no TensorRT. torchvision is the reference. On the
host driver the modules run on the CPU, and a CUDA graph is only traced.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.ops import box_iou

from benchmarks.gpu_parity import open_model, run_torch
from maskcast.builder.graph.export import (
    DETECTOR_INPUTS,
    DETECTOR_OUTPUTS,
    SEGMENTER_INPUTS,
    SEGMENTER_OUTPUTS,
)
from maskcast.builder.graph.operators import grouped_nms, multiscale_roi_align
from maskcast.builder.network.detector import Detector, Segmenter
from maskcast.engines.bundle import Bundle, FixedInput
from maskcast.engines.image import NetworkImage
from maskcast.engines.plan import Plan
from maskcast.engines.tensorrt.engine import TensorRTEngine
from maskcast.engines.tensorrt.plan import LoadedPlan
from maskcast.engines.tensorrt.plugins.library import Kernels

MAX_BATCH = 2
_TYPES = {torch.float32: "FLOAT", torch.int64: "INT64", torch.int32: "INT32"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}


class Graphs:
    """The default model at a size, as torch modules and as torchvision's network.

    Every image has as many detections as possible, so that noise is enough.

    Args:
        device: of ``benchmarks.gpu_devices``.
        size: height and width of the network's input.
        detections: number per image; there are three times as many proposals.
    """

    def __init__(self, device: Any, size: tuple[int, int], detections: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device, self.size = device, size
        with tempfile.TemporaryDirectory() as scratch:
            self.bundle, self.network = open_model("default", Path(scratch), size)
        self.detections = detections
        self.network.roi_heads.score_thresh = 0.0
        self.network.roi_heads.detections_per_img = detections
        self.network.rpn._post_nms_top_n = {"testing": 3 * detections}
        self.network.to(device.torch)
        self.detector = Detector(self.network).to(device.torch).eval()
        self.segmenter = Segmenter(self.network).to(device.torch).eval()
        noise = np.random.default_rng(0).integers(0, 256, (4, *size, 3), np.uint8)
        self.images = [NetworkImage(pixels, size, size) for pixels in noise]

    def detector_inputs(self, images: Sequence[NetworkImage]) -> tuple[Tensor, Tensor]:
        """Return the detector's ``images`` and ``sizes``."""
        pixels = np.stack([image.pixels.transpose(2, 0, 1) for image in images])
        sizes = torch.tensor([image.content for image in images], dtype=torch.float32)
        return (
            torch.from_numpy(pixels).to(self.device.torch, torch.float32),
            sizes.to(self.device.torch),
        )

    @torch.inference_mode()
    def run(self, images: Sequence[NetworkImage]) -> tuple[Tensor, ...]:
        """Run both modules: boxes, scores and labels of each image, masks of all boxes."""
        with torch.device(self.device.torch):
            found = self.detector(*self.detector_inputs(images))
            index = torch.arange(len(images), dtype=torch.int32).repeat_interleave(self.detections)
            boxes, _, labels = (part.flatten(0, 1) for part in found[:3])
            masks = self.segmenter(*found[4:], boxes, labels, index)
        return (*found[:3], masks)


def bind_kernels(device: Any) -> str:
    """Register the shipped kernels for the project's operators, in this process."""
    kernels = Kernels()

    def align(
        p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, rois: Tensor, batch_index: Tensor,
        output_size: int, sampling_ratio: int, aligned: bool,
    ) -> Tensor:  # fmt: skip
        levels = [level.contiguous() for level in (p2, p3, p4, p5)]
        pooled = p2.new_empty(len(rois), p2.shape[1], output_size, output_size)

        def run(pointers: list[int], stream: int) -> None:
            kernels.roi_align(
                pointers[:4], [(level.shape[2], level.shape[3]) for level in levels],
                *pointers[4:], images=p2.shape[0], boxes=len(rois), channels=p2.shape[1],
                output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned,
                half=p2.dtype == torch.float16, stream=stream,
            )  # fmt: skip

        device.call(run, [*levels, rois.contiguous(), batch_index.contiguous()], [pooled])
        return pooled

    def nms(
        boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float,
        score_threshold: float, max_output: int,
    ) -> Tensor:  # fmt: skip
        images, candidates = scores.shape
        keep = boxes.new_empty(images, max_output, dtype=torch.int32)
        size = kernels.nms_workspace_bytes(images, candidates)
        workspace = boxes.new_empty(size, dtype=torch.uint8)

        def run(pointers: list[int], stream: int) -> None:
            kernels.grouped_nms(
                *pointers, images=images, candidates=candidates, max_output=max_output,
                iou_threshold=iou_threshold, score_threshold=score_threshold, stream=stream,
            )  # fmt: skip

        given = [boxes.contiguous(), scores.contiguous(), groups.contiguous()]
        device.call(run, given, [keep, workspace])
        return keep

    multiscale_roi_align.register_kernel(device.torch)(align)
    grouped_nms.register_kernel(device.torch)(nms)
    return "bound"


def parity(graphs: Graphs) -> dict[str, float]:
    """Compare the modules with torchvision's network, image by image; raises where they differ."""
    found: dict[str, list[float]] = {"matched": [], "score": [], "mask": []}
    for image in graphs.images:
        wanted = run_torch(graphs.network, image, graphs.device.torch)
        boxes, scores, labels, masks = (part.cpu() for part in graphs.run([image]))
        overlap = box_iou(torch.from_numpy(wanted["boxes"]), boxes[0])
        overlap *= torch.from_numpy(wanted["labels"])[:, None] == labels[0]
        best, which = overlap.max(dim=1)
        same = best > 0.99
        score = torch.from_numpy(wanted["scores"]) - scores[0, which]
        mask = torch.from_numpy(wanted["masks"][:, 0]) - masks[which]
        found["matched"].append(float(same.float().mean()))
        found["score"].append(float(score[same].abs().max()))
        found["mask"].append(float(mask[same].abs().mean()))
    if min(found["matched"]) < 0.95 or max(found["score"]) > 1e-3 or max(found["mask"]) > 1e-3:
        raise AssertionError(f"the graphs differ from torchvision: {found}")
    return {"matched_least": min(found["matched"]), "score_most": max(found["score"]),
            "mask_mean_most": max(found["mask"])}  # fmt: skip


def capture(graphs: Graphs) -> str:
    """Capture the detector with the kernels in a CUDA graph; its results must not change."""
    images, sizes = graphs.detector_inputs(graphs.images[:1])
    others, _ = graphs.detector_inputs(graphs.images[1:2])
    with torch.inference_mode(), torch.device(graphs.device.torch):
        wanted = [part.clone() for part in graphs.detector(others, sizes)]
        # A trace copies no constants from the host, which a capture forbids.
        traced = make_fx(graphs.detector)(images, sizes)
        outputs: list[tuple[Tensor, ...]] = []
        work = partial(_append, outputs, traced, images, sizes)
        work()
        launch = graphs.device.replay_torch(work)
        images.copy_(others)
        launch()
        graphs.device.wait()
        for one, other in zip(outputs[-1], wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    return "replayed on another image, results equal"


def _append(outputs: list[Any], module: Any, *inputs: Tensor) -> None:
    outputs.append(module(*inputs))


class TorchEngine:
    """TensorRT's ``ICudaEngine``: the tensors of a module; one profile, for ``most`` boxes."""

    num_optimization_profiles = 1

    def __init__(
        self, module: Any, given: dict[str, Tensor], outputs: Sequence[str], most: int
    ) -> None:
        self.module, self.inputs, self.outputs = module, tuple(given), tuple(outputs)
        self._most = most
        with torch.inference_mode(), torch.device(next(iter(given.values())).device):
            made = module(*given.values())
        made = made if isinstance(made, tuple) else (made,)
        self._tensors = dict(zip((*given, *outputs), (*given.values(), *made), strict=True))
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._tensors[name].shape[1:])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[self._tensors[name].dtype])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        most = self._most if name in ("boxes", "labels", "batch_index") else MAX_BATCH
        return [(n, *self._tensors[name].shape[1:]) for n in (1, most, most)]


class TorchContext:
    """TensorRT's ``IExecutionContext``: runs the module on the engine's memory and stream."""

    def __init__(self, engine: TorchEngine, device: Any) -> None:
        self._engine, self._device = engine, device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return False  # torch allocates as it runs

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self._device.enqueue(stream, lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self._engine

        def at(name: str, shape: tuple[int, ...]) -> Tensor:
            dtype = _NUMPY[engine.get_tensor_dtype(name).name]
            tensor: Tensor = self._device.tensor_at(addresses[name], shape, dtype)
            return tensor

        with torch.inference_mode(), torch.device(self._device.torch):
            given = [at(name, shapes[name]) for name in engine.inputs]
            if "batch_index" in engine.inputs:  # padding belongs to no image
                given[-1] = given[-1].clamp(min=0)
            made = engine.module(*given)
            made = made if isinstance(made, tuple) else (made,)
            for name, tensor in zip(engine.outputs, made, strict=True):
                at(name, tuple(tensor.shape)).copy_(tensor)


def engine_on_torch(graphs: Graphs, batches: int) -> dict[str, Any]:
    """Run TensorRTEngine with torch in TensorRT's place: results, three threads, memory.

    pycuda, kernels, streams, events and rings are real. The results of every batch must be those of
    the modules alone.
    """
    device, images = graphs.device, graphs.images
    free_before = device.free_bytes()
    engine = open_torch_engine(graphs)
    try:
        work = [
            [images[(i + k) % len(images)] for k in range(1 + i % MAX_BATCH)]
            for i in range(batches)
        ]
        wanted = {id(image): graphs.run([image]) for image in images}
        found = _in_three_threads(engine, work)
        for batch, instances in zip(work, found, strict=True):
            for image, one in zip(batch, instances, strict=True):
                boxes, scores, _, masks = (part.cpu().numpy() for part in wanted[id(image)])
                count = len(one)
                np.testing.assert_allclose(one.boxes, boxes[0, :count], atol=0.05)
                np.testing.assert_allclose(one.scores, scores[0, :count], atol=1e-3)
                assert isinstance(one.masks, np.ndarray)
                apart = np.abs(one.masks / 255 - masks[:count]).mean()
                if apart > 5e-3:
                    raise AssertionError(f"masks differ by {apart}")
    finally:
        engine.close()
    lost = free_before - device.free_bytes()
    return {"batches": batches, "detections": sum(len(i) for b in found for i in b),
            "bytes_not_freed": lost}  # fmt: skip


def _in_three_threads(
    engine: TensorRTEngine, work: Sequence[Sequence[NetworkImage]]
) -> list[list[Any]]:
    """Upload, detect and segment batches, each in a thread of its own, as the pipeline does."""
    ahead: queue.Queue[Any] = queue.Queue(1)
    between: queue.Queue[Any] = queue.Queue(1)
    found: list[list[Any]] = []
    failures: list[BaseException] = []

    def thread(step: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                step()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run, daemon=True)

    def upload() -> None:
        for batch in work:
            for image in batch:
                engine.prefetch(image)
            ahead.put(batch)

    def detect() -> None:
        for _ in work:
            between.put(engine.detect(ahead.get(), 0.0))

    def segment() -> None:
        found.extend(engine.segment(between.get()) for _ in work)

    threads = [thread(step) for step in (upload, detect, segment)]
    for one in threads:
        one.start()
    for one in threads:
        while one.is_alive() and not failures:
            one.join(0.1)
    if failures:
        raise failures[0]
    return found


def open_torch_engine(graphs: Graphs) -> TensorRTEngine:
    """Open the engine with torch in TensorRT's place."""
    plan = Plan(
        graph="detector", file="detector.plan", sha256="0" * 64, package="tensorrt", version="1.0",
        capabilities=("8.9",), precision="fp32", height=graphs.size[0], width=graphs.size[1],
        max_batch=MAX_BATCH, graph_sha256="0" * 64, plugins={},
    )  # fmt: skip
    most = MAX_BATCH * graphs.detections
    plans = (plan, replace(plan, graph="segmenter", max_boxes=most))
    bundle = graphs.bundle
    manifest = replace(
        bundle.manifest, backend="tensorrt", precision="fp32", input=FixedInput(*graphs.size),
        plans=plans, graphs=replace(bundle.manifest.graphs, poser=None), keypoints=None,
    )  # fmt: skip
    detector_inputs = graphs.detector_inputs(graphs.images[:1])
    with torch.inference_mode(), torch.device(graphs.device.torch):
        features = graphs.detector(*detector_inputs)[4:]
        boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        of_boxes = (boxes, torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    engines = {
        "detector": TorchEngine(
            graphs.detector,
            dict(zip(DETECTOR_INPUTS, detector_inputs, strict=True)),
            DETECTOR_OUTPUTS,
            most,
        ),
        "segmenter": TorchEngine(
            graphs.segmenter,
            dict(zip(SEGMENTER_INPUTS, (*features, *of_boxes), strict=True)),
            SEGMENTER_OUTPUTS,
            most,
        ),
    }

    def open_plans(
        bundle: Bundle, capability: tuple[int, int], names: Sequence[str]
    ) -> Iterator[LoadedPlan]:
        for name in names:
            engine = engines[name]
            yield LoadedPlan(engine, [TorchContext(engine, graphs.device)], name)

    return TensorRTEngine(Bundle(bundle.path, manifest), open_plans=open_plans)
