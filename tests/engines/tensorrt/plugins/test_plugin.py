"""The plugins' enqueue, through the real plugin classes and real pycuda, on the host driver."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from torchvision.ops import nms, roi_align

from maskcast.engines.tensorrt.device import Gpu
from maskcast.engines.tensorrt.plugins.driver import CudaError, compute_capability, kernels
from maskcast.engines.tensorrt.plugins.operator import GroupedNms, MultiscaleRoiAlign, Tensor
from maskcast.engines.tensorrt.plugins.plugin import _creator_class, make_plugin

pytestmark = pytest.mark.host_gpu

trt = pytest.importorskip("tensorrt_rtx")


class Card:
    """A GPU with one stream, and arrays that are copied to it and freed with it."""

    def __init__(self):
        self.gpu = Gpu()
        self._memory, self._pinned = [], []
        with self.gpu.current():
            self.stream = self.gpu.stream()

    def put(self, array):
        with self.gpu.current():
            staged = self.gpu.pinned(array.shape, array.dtype)
            staged[...] = array
            memory = self.empty(array.nbytes)
            if array.nbytes:
                self.gpu.upload(memory, staged, self.stream)
        self._pinned.append(staged)
        return memory

    def empty(self, size):
        with self.gpu.current():
            memory = self.gpu.allocate(max(size, 1))
        self._memory.append(memory)
        return int(memory)

    def get(self, memory, shape, dtype, *, synchronise=True):
        with self.gpu.current():
            staged = self.gpu.pinned(shape, dtype)
            self._pinned.append(staged)
            self.gpu.download(staged, memory, self.stream)
            if synchronise:
                self.stream.wait()
        return staged.copy()

    def close(self):
        with self.gpu.current():
            self.stream.wait()
            self.stream.free()
            for memory in self._memory:
                memory.free()
            self.gpu.release(*self._pinned)
        self.gpu.close()


@pytest.fixture
def card(host_driver):
    card = Card()
    yield card
    card.close()


def describe(array):
    desc = trt.PluginTensorDesc()
    desc.dims = trt.Dims(array.shape)
    desc.type = {"f4": trt.float32, "f2": trt.float16, "i4": trt.int32}[array.dtype.str[1:]]
    desc.format = trt.TensorFormat.LINEAR
    return desc


def enqueue(card, operator, inputs, output):
    """Call a plugin as TensorRT does; returns where the output lies."""
    plugin = make_plugin(trt, operator)
    with card.gpu.current():
        attached = plugin.attach_to_context(None)
    memory = card.empty(output.nbytes)
    workspace = card.empty(operator.workspace_bytes([array.shape for array in inputs]))
    pointers = [card.put(array) for array in inputs]
    with card.gpu.current():
        attached.enqueue(
            [describe(array) for array in inputs], [describe(output)], pointers, [memory],
            workspace, card.stream.handle,
        )  # fmt: skip
    return memory


def proposals(seed=0, count=300):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 200, (1, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, corner.shape)], 2).astype("f4")
    scores = rng.permutation(np.linspace(0.01, 0.99, count)).astype("f4")[None]
    return boxes, scores, np.zeros((1, count), "i4")


def kept(boxes, scores, most):
    order = nms(torch.from_numpy(boxes[0]), torch.from_numpy(scores[0]), 0.5).numpy()
    return np.concatenate([order, np.full(most, -1)])[:most]


def pyramid(dtype="f4"):
    rng = np.random.default_rng(0)
    levels = [rng.standard_normal((1, 5, 64 >> i, 96 >> i)).astype(dtype) for i in range(4)]
    rois = np.array([[0, 0, 50, 60], [10, 20, 380, 250], [100, 7, 130, 90]], "f4")
    return [*levels, rois, np.zeros(3, "i4")]


def test_nms_keeps_what_torchvision_keeps(card):
    inputs = proposals()
    operator = GroupedNms(iou_threshold=0.5, score_threshold=0.0, max_output=100)
    keep = enqueue(card, operator, inputs, np.empty((1, 100), "i4"))
    found = card.get(keep, (1, 100), np.int32)
    np.testing.assert_array_equal(found[0], kept(inputs[0], inputs[1], 100))


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_roi_align_pools_what_torchvision_pools(card, dtype):
    inputs = pyramid(dtype)
    operator = MultiscaleRoiAlign(output_size=7, sampling_ratio=2, aligned=0)
    pooled = enqueue(card, operator, inputs, np.empty((3, 5, 7, 7), dtype))
    found = card.get(pooled, (3, 5, 7, 7), np.dtype(dtype))
    regions = torch.from_numpy(np.concatenate([np.zeros((3, 1)), inputs[4]], 1).astype("f4"))
    for i, level in enumerate((0, 2, 0)):  # by the sides of the boxes
        feature = torch.from_numpy(inputs[level].astype("f4"))
        wanted = roi_align(feature, regions[i : i + 1], 7, 1 / (4 << level), 2)
        np.testing.assert_allclose(found[i], wanted[0], atol=5e-3 if dtype == "f2" else 1e-5)


def churn():
    """Reuse the memory of whatever nobody holds any more."""
    return [np.array([1 << 30], "i4") for _ in range(2000)]


def read(collection):
    return {field.name: np.asarray(field.data).ravel()[0] for field in collection}


def test_attributes_read_back_long_after_they_were_handed_over():
    plugin = make_plugin(trt, GroupedNms(iou_threshold=0.7, score_threshold=-1.0, max_output=300))
    collection = plugin.get_fields_to_serialize()
    gc.collect()
    kept = churn()
    assert read(collection) == {
        "iou_threshold": np.float32(0.7), "score_threshold": -1.0, "max_output": 300,
    }  # fmt: skip
    del kept


@pytest.mark.parametrize("operator", [GroupedNms(), MultiscaleRoiAlign()])
def test_a_creator_makes_the_operator_of_its_own_fields(operator):
    creator = _creator_class(trt)(type(operator))
    gc.collect()
    kept = churn()
    made = creator.create_plugin(operator.name, creator.field_names, trt.TensorRTPhase.BUILD)
    assert made.operator == operator
    del kept


def test_no_boxes_launch_nothing(card, host_driver):
    inputs = [*pyramid()[:4], np.empty((0, 4), "f4"), np.empty(0, "i4")]
    enqueue(card, MultiscaleRoiAlign(), inputs, np.empty((0, 5, 7, 7), "f4"))
    assert "launches of multiscale_roi_align_f32" not in host_driver.report()


def test_enqueue_only_queues_work_and_never_waits_for_it(card, host_driver):
    keep = enqueue(card, GroupedNms(max_output=100), proposals(), np.empty((1, 100), "i4"))
    assert host_driver.report()["pending"] == 6  # three uploads, three kernels
    stale = card.get(keep, (1, 100), np.int32, synchronise=False)
    assert (stale == np.int32(-875836469)).all()  # 0xCBCBCBCB: nothing has run


def test_enqueue_neither_allocates_nor_loads_anything(card, host_driver):
    enqueue(card, GroupedNms(max_output=100), proposals(), np.empty((1, 100), "i4"))
    inputs, output = proposals(1), np.empty((1, 100), "i4")
    operator = GroupedNms(max_output=100)
    with card.gpu.current():
        attached = make_plugin(trt, operator).attach_to_context(None)
    pointers = [card.put(array) for array in inputs]
    memory, workspace = card.empty(400), card.empty(operator.workspace_bytes([(1, 300, 4)]))
    descs = [describe(array) for array in inputs], [describe(output)]
    before = host_driver.report()
    with card.gpu.current():
        attached.enqueue(*descs, pointers, [memory], workspace, card.stream.handle)
    after = host_driver.report()
    changed = {name for name in after if after[name] != before.get(name, 0)}
    queued = {"launches of nms_rank", "launches of nms_overlap", "launches of nms_select"}
    assert changed == {"pending", *queued}


def test_contexts_and_threads_share_the_loaded_kernels(card):
    inputs = proposals()
    found, loaded = {}, set()

    def work(i):
        with card.gpu.current():
            loaded.add(id(kernels()))
        mine = Card()
        keep = enqueue(mine, GroupedNms(max_output=50), inputs, np.empty((1, 50), "i4"))
        found[i] = mine.get(keep, (1, 50), np.int32)
        mine.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(loaded) == 1
    for keep in found.values():
        np.testing.assert_array_equal(keep[0], kept(inputs[0], inputs[1], 50))


def test_without_a_current_context_the_error_says_so():
    with pytest.raises(CudaError, match="no CUDA context is current"):
        kernels()


def test_a_broken_device_fails_the_launch(card, host_driver, caplog):
    inputs = proposals()
    pointers = [card.put(array) for array in inputs]
    operator = GroupedNms(max_output=10)
    memory, workspace = card.empty(40), card.empty(operator.workspace_bytes([(1, 300, 4)]))
    with card.gpu.current():
        attached = make_plugin(trt, operator).attach_to_context(None)
        host_driver.break_down()
        with pytest.raises(CudaError, match="illegal memory access"):
            attached.enqueue(
                [describe(array) for array in inputs],
                [describe(np.empty((1, 10), "i4"))],
                pointers, [memory], workspace, card.stream.handle,
            )  # fmt: skip
        host_driver.break_down(0)
    assert "GroupedNms failed on the GPU" in caplog.text


def test_the_capability_is_read_without_pycuda():
    assert compute_capability() == (8, 9)
    assert compute_capability(7) is None


# The net under the tests above: what it must catch, it catches.


def test_the_host_driver_catches_a_wrong_argument_size(card, host_driver):
    with card.gpu.current():
        task = GroupedNms().launches([Tensor(0, (1, 0, 4), "f32")] * 3, Tensor(0, (), "i32"), 0)[0]
        object.__setattr__(task, "kernel", "preprocess_f32")
        with pytest.raises(CudaError):
            kernels().launch([task], card.stream.handle)
    assert "takes 408 bytes of arguments, got 88" in host_driver.faults()[0]
    host_driver.reset()


def test_the_host_driver_catches_a_write_behind_the_end(card, host_driver):
    boxes, scores, groups = proposals()
    operator = GroupedNms(max_output=100)
    pointers = [card.put(array) for array in (boxes, scores, groups)]
    workspace = card.empty(operator.workspace_bytes([boxes.shape]))
    short = card.empty(4 * 60)  # for 60 indices, not 100
    shapes = zip(pointers, ((1, 300, 4), (1, 300), (1, 300)), ("f32", "f32", "i32"), strict=True)
    inputs = [Tensor(*parts) for parts in shapes]
    with card.gpu.current():
        kernels().launch(
            operator.launches(inputs, Tensor(short, (1, 100), "i32"), workspace),
            card.stream.handle,
        )
        card.stream.wait()
    assert "written outside an allocation of 240 bytes" in host_driver.faults()[0]
    host_driver.reset()


def test_the_host_driver_catches_pageable_memory_in_an_asynchronous_copy(card, host_driver):
    import pycuda.driver as cuda

    memory = card.empty(64)
    with card.gpu.current(), pytest.raises(cuda.Error):
        card.gpu.upload(memory, np.zeros(16, "f4"), card.stream)
    assert "outside device or pinned memory" in host_driver.faults()[0]
    host_driver.reset()


def test_the_host_driver_catches_memory_freed_in_flight(card, host_driver):
    memory = card.empty(64)
    with card.gpu.current():
        staged = card.gpu.pinned((16,), np.float32)
        card.gpu.upload(memory, staged, card.stream)
        card.gpu.release(staged)
        card.stream.wait()
    assert host_driver.faults() == [
        "cuMemFreeHost: queued work uses the memory",
        "cuMemcpyHtoDAsync: the memory was freed before the copy",
    ]
    host_driver.reset()


def test_the_host_driver_catches_a_leak(host_driver):
    gpu = Gpu()
    with gpu.current():
        memory = gpu.allocate(64)
    assert host_driver.report()["device allocations"] == 1
    with gpu.current():
        memory.free()
    gpu.close()
