"""The native library on the host driver: its functions, and its plugins called as TensorRT does."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
import torch
from host_compiler import compile_on_host, header_options
from torchvision.ops import nms, roi_align

from maskcast.engines.errors import InputError
from maskcast.engines.tensorrt.device import Gpu
from maskcast.engines.tensorrt.plugins import library as library_module
from maskcast.engines.tensorrt.plugins.library import (
    CudaError,
    Kernels,
    compute_capability,
    library_path,
)

pytestmark = pytest.mark.host_gpu

NMS = {"iou_threshold": 0.5, "score_threshold": 0.0, "max_output": 100}
ALIGN = {"output_size": 7, "sampling_ratio": 2, "aligned": 0}
TYPES = {"f4": 0, "f2": 1, "i4": 3}  # nvinfer1::DataType


class Card:
    """A GPU with one stream, and arrays that are copied to it and freed with it."""

    def __init__(self):
        self.gpu = Gpu()
        self._memory, self._pinned, self._foreign = [], [], []
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

    def keep(self, address):
        """Free memory that was allocated elsewhere together with the rest."""
        self._foreign.append(address)

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
            for address in self._foreign:
                ctypes.CDLL("libcuda.so.1").cuMemFree_v2(ctypes.c_void_p(address))
            self.gpu.release(*self._pinned)
        self.gpu.close()


@pytest.fixture
def card(host_driver):
    card = Card()
    yield card
    card.close()


class CalledTensor(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
        ("pointer", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, array, pointer):
        dims = (ctypes.c_int64 * 4)(*array.shape)
        return cls(array.ndim, TYPES[array.dtype.str[1:]], dims, pointer)


class RefusedError(Exception):
    pass


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """Calls plugins through TensorRT's C++ interfaces; see plugin_caller.cpp."""
    path = tmp_path_factory.mktemp("caller") / "libcaller.so"
    ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)  # for its cuMemAlloc
    compile_on_host(path, "plugin_caller.cpp", options=header_options())
    library = ctypes.CDLL(str(path))
    library.plugin_caller_reason.restype = ctypes.c_char_p
    return library


@pytest.fixture
def call(card, caller):
    """Call a plugin with attributes and arrays; returns where the output lies."""

    def run(name, attributes, inputs, output):
        tensors = (CalledTensor * len(inputs))()
        for i, array in enumerate(inputs):
            tensors[i] = CalledTensor.of(array, card.put(array))
        made = CalledTensor(pointer=card.empty(output.nbytes))
        workspace = ctypes.c_void_p()
        values = (ctypes.c_double * len(attributes))(*attributes.values())
        with card.gpu.current():
            failed = caller.call_plugin(
                str(library_path()).encode(), name.encode(), values, tensors, len(inputs),
                ctypes.byref(made), ctypes.byref(workspace),
                ctypes.c_void_p(card.stream.handle),
            )  # fmt: skip
        if workspace.value:
            card.keep(workspace.value)
        if failed:
            raise RefusedError(caller.plugin_caller_reason().decode())
        assert tuple(made.dims[: made.rank]) == output.shape
        assert made.type == TYPES[output.dtype.str[1:]]
        return made.pointer

    return run


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


def run_nms(card, boxes, scores, groups, most=100):
    """Call the function for NMS; returns where the kept indices lie."""
    kernels = Kernels()
    images, candidates = scores.shape
    keep = card.empty(4 * images * most)
    pointers = [card.put(array) for array in (boxes, scores, groups)]
    workspace = card.empty(kernels.nms_workspace_bytes(images, candidates))
    with card.gpu.current():
        kernels.grouped_nms(
            *pointers, keep, workspace, images=images, candidates=candidates, max_output=most,
            iou_threshold=0.5, score_threshold=0.0, stream=card.stream.handle,
        )  # fmt: skip
    return keep


def test_the_nms_plugin_keeps_what_torchvision_keeps(card, call):
    inputs = proposals()
    keep = call("GroupedNms", NMS, inputs, np.empty((1, 100), "i4"))
    found = card.get(keep, (1, 100), np.int32)
    np.testing.assert_array_equal(found[0], kept(inputs[0], inputs[1], 100))


@pytest.mark.parametrize("size", [7, 14, 5])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_the_roi_align_plugin_pools_what_torchvision_pools(card, call, dtype, size):
    inputs, output = pyramid(dtype), np.empty((3, 5, size, size), dtype)
    pooled = call("MultiscaleRoiAlign", ALIGN | {"output_size": size}, inputs, output)
    found = card.get(pooled, output.shape, output.dtype)
    regions = torch.from_numpy(np.concatenate([np.zeros((3, 1)), inputs[4]], 1).astype("f4"))
    for i, level in enumerate((0, 2, 0)):  # by the sides of the boxes
        feature = torch.from_numpy(inputs[level].astype("f4"))
        wanted = roi_align(feature, regions[i : i + 1], size, 1 / (4 << level), 2)
        np.testing.assert_allclose(found[i], wanted[0], atol=5e-3 if dtype == "f2" else 1e-5)


def test_no_boxes_launch_nothing(call, host_driver):
    inputs = [*pyramid()[:4], np.empty((0, 4), "f4"), np.empty(0, "i4")]
    call("MultiscaleRoiAlign", ALIGN, inputs, np.empty((0, 5, 7, 7), "f4"))
    assert "launches of multiscale_roi_align_f32" not in host_driver.report()


def test_attributes_left_out_have_the_defaults_of_the_operators(card, call):
    inputs = proposals()
    nothing = dict.fromkeys(NMS, np.nan)
    keep = call("GroupedNms", nothing, inputs, np.empty((1, 100), "i4"))
    found = card.get(keep, (1, 100), np.int32)
    np.testing.assert_array_equal(found[0], kept(inputs[0], inputs[1], 100))


@pytest.mark.parametrize(
    ("name", "attributes", "reason"),
    [
        ("GroupedNms", NMS | {"max_output": 0}, "max_output must be 1 or more"),
        ("GroupedNms", NMS | {"max_output": 2.5}, "not one number of its type"),
        ("GroupedNms", NMS | {"iou_threshold": -0.5}, "iou_threshold must be 0 or more"),
        ("MultiscaleRoiAlign", ALIGN | {"sampling_ratio": 0}, "must be 1 or more"),
        ("MultiscaleRoiAlign", ALIGN | {"output_size": 33}, "their product at most 64"),
    ],
)
def test_attributes_that_the_kernels_cannot_take_are_refused(call, capfd, name, attributes, reason):
    inputs = proposals() if name == "GroupedNms" else pyramid()
    with pytest.raises(RefusedError, match="at creation"):
        call(name, attributes, inputs, np.empty(1, "f4"))
    assert reason in capfd.readouterr().err


def test_more_candidates_than_the_kernels_take_are_refused(call, capfd):
    boxes, scores, groups = proposals(count=8193)
    with pytest.raises(RefusedError, match="refused a shape"):
        call("GroupedNms", NMS, [boxes, scores, groups], np.empty((1, 100), "i4"))
    assert "more than 8192 candidates" in capfd.readouterr().err


def test_enqueue_only_queues_work_and_never_waits_for_it(card, call, host_driver):
    keep = call("GroupedNms", NMS, proposals(), np.empty((1, 100), "i4"))
    assert host_driver.report()["pending"] == 6  # three uploads, three kernels
    stale = card.get(keep, (1, 100), np.int32, synchronise=False)
    assert (stale == np.int32(-875836469)).all()  # 0xCBCBCBCB: nothing has run


def test_a_broken_device_fails_the_plugin_with_the_drivers_message(
    card, call, host_driver, monkeypatch, capfd
):
    output = np.empty((3, 5, 7, 7), "f4")
    call("MultiscaleRoiAlign", ALIGN, pyramid(), output)
    inputs = pyramid()
    pointers = iter([card.put(array) for array in inputs])
    monkeypatch.setattr(card, "put", lambda array: next(pointers))
    memory = card.empty(output.nbytes)
    monkeypatch.setattr(card, "empty", lambda size: memory)
    host_driver.break_down()
    with pytest.raises(RefusedError, match="enqueue failed"):
        call("MultiscaleRoiAlign", ALIGN, inputs, output)
    host_driver.break_down(0)
    assert "illegal memory access" in capfd.readouterr().err


def test_the_functions_do_what_the_plugins_do(card):
    boxes, scores, groups = proposals()
    found = card.get(run_nms(card, boxes, scores, groups), (1, 100), np.int32)
    np.testing.assert_array_equal(found[0], kept(boxes, scores, 100))


def test_a_second_call_neither_allocates_nor_loads_anything(card, host_driver):
    run_nms(card, *proposals())
    kernels, most = Kernels(), 100
    keep = card.empty(400)
    pointers = [card.put(array) for array in proposals(1)]
    workspace = card.empty(kernels.nms_workspace_bytes(1, 300))
    before = host_driver.report()
    with card.gpu.current():
        kernels.grouped_nms(
            *pointers, keep, workspace, images=1, candidates=300, max_output=most,
            iou_threshold=0.5, score_threshold=0.0, stream=card.stream.handle,
        )  # fmt: skip
    after = host_driver.report()
    changed = {name for name in after if after[name] != before.get(name, 0)}
    queued = {"launches of nms_rank", "launches of nms_overlap", "launches of nms_select"}
    assert changed == {"pending", *queued}


def test_contexts_and_threads_share_the_loaded_kernels(card, host_driver):
    inputs = proposals()
    found = {}
    with card.gpu.current():
        Kernels().load()
    modules = host_driver.report()["modules"]

    def work(i):
        mine = Card()
        keep = run_nms(mine, *inputs, most=50)
        found[i] = mine.get(keep, (1, 50), np.int32)
        mine.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert host_driver.report()["modules"] == modules == 1
    for keep in found.values():
        np.testing.assert_array_equal(keep[0], kept(inputs[0], inputs[1], 50))


def test_a_missing_current_context_is_named(host_driver):
    with pytest.raises(CudaError, match="no CUDA context is current"):
        Kernels().load()


def test_a_broken_device_fails_a_launch(card, host_driver):
    run_nms(card, *proposals())
    kernels = Kernels()
    with card.gpu.current():
        host_driver.break_down()
        with pytest.raises(CudaError, match="illegal memory access"):
            kernels.crops_to_bytes(0, 0, 4, card.stream.handle)
        host_driver.break_down(0)


def test_a_processor_without_a_library_gets_the_command_that_builds_it(monkeypatch):
    monkeypatch.setattr(library_module.platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match=r"not built for riscv64.*tensorrt\.plugin_library`"):
        library_path()


def test_the_capability_is_read_without_pycuda():
    assert compute_capability() == (8, 9)
    assert compute_capability(7) is None


# The tests above depend on the host driver's checks; these prove that it makes them.


def test_the_host_driver_catches_a_wrong_argument_size(card, host_driver):
    driver = ctypes.CDLL("libcuda.so.1")
    with card.gpu.current():
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        fatbin = (library_module.FOLDER / "kernels.fatbin").read_bytes()
        assert driver.cuModuleLoadData(ctypes.byref(module), fatbin) == 0
        driver.cuModuleGetFunction(ctypes.byref(function), module, b"preprocess")
        size = ctypes.c_size_t(88)
        buffer = ctypes.create_string_buffer(88)
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        stream = ctypes.c_void_p(card.stream.handle)
        assert driver.cuLaunchKernel(function, *(1,) * 6, 0, stream, None, extra) != 0
    assert "takes 144 bytes of arguments, got 88" in host_driver.faults()[0]
    host_driver.reset()


def test_the_host_driver_catches_a_write_past_the_end(card, host_driver, monkeypatch):
    empty = card.empty
    monkeypatch.setattr(card, "empty", lambda size: empty(240 if size == 400 else size))
    run_nms(card, *proposals())  # 100 indices, and memory for 60
    with card.gpu.current():
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
