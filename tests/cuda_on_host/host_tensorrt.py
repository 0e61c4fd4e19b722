"""A double of TensorRT on the host driver, and a small bundle for it to run.

It has the methods of ``ICudaEngine`` and ``IExecutionContext`` that the engine calls, queues its
work on the stream like TensorRT, and runs the portable graph in onnxruntime, reading and writing
"device" memory at the addresses that the engine sets.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from functools import partial

import msgspec
import numpy as np
import onnx
import onnxruntime
from msgspec.structs import replace

from maskcast.builder.graph.operators import function_bodies
from maskcast.engines.bundle import (
    MANIFEST,
    FixedInput,
    GraphFile,
    Graphs,
    Manifest,
    open_bundle,
    sha256,
)
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.engines.plan import Plan
from maskcast.engines.tensorrt.plan import LoadedPlan

HEIGHT, WIDTH, MAX_BATCH = 64, 96, 4

# Scores depend on the image's mean, boxes on its content's size, masks on the image inside the box:
# a wrong upload, size or order changes the result.
DETECTOR = """
<ir_version: 10, opset_import: ["" : 18]>
detector (float[batch, 3, 64, 96] images, float[batch, 2] sizes)
  => (float[batch, 3, 4] boxes, float[batch, 3] scores, int64[batch, 3] labels, int64[batch] counts,
      float[batch, 3, 16, 24] p2, float[batch, 3, 8, 12] p3, float[batch, 3, 4, 6] p4,
      float[batch, 3, 2, 3] p5)
<int64[3] pixels = {1, 2, 3}, float[1, 3] weights = {0.0039, 0.0031, 0.0002}, int64[1] one = {1},
 int64[4] corners = {1, 0, 1, 0}, int64[1, 3] classes = {1, 2, 1}, float least = {0.004},
 float[1, 3, 4] parts = {0.1, 0.2, 0.8, 0.9, 0.0, 0.0, 0.5, 0.5, 0.3, 0.3, 0.4, 0.4}>
{
    p2 = AveragePool <kernel_shape: ints = [4, 4], strides: ints = [4, 4]> (images)
    p3 = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (p2)
    p4 = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (p3)
    p5 = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (p4)
    mean3 = ReduceMean <keepdims: int = 0> (images, pixels)
    mean = Unsqueeze (mean3, one)
    scores = Mul (mean, weights)
    found = Greater (scores, least)
    present = Cast <to: int = 7> (found)
    labels = Mul (present, classes)
    counts = ReduceSum <keepdims: int = 0> (present, one)
    extent2 = Gather <axis: int = 1> (sizes, corners)
    extent = Unsqueeze (extent2, one)
    boxes = Mul (extent, parts)
}
"""
SEGMENTER = """
<ir_version: 10, opset_import: ["" : 18, "maskcast" : 1]>
segmenter (float[batch, 3, 16, 24] p2, float[batch, 3, 8, 12] p3, float[batch, 3, 4, 6] p4,
           float[batch, 3, 2, 3] p5, float[r, 4] boxes, int64[r] labels, int32[r] batch_index)
  => (float[r, 28, 28] masks)
<int64[1] one = {1}, int64[2] last = {1, 2}, float whole = {510.0}>
{
    pooled = maskcast.MultiscaleRoiAlign <output_size: int = 28, sampling_ratio: int = 2,
        aligned: int = 0, plugin_namespace: string = "maskcast", plugin_version: string = "1">
        (p2, p3, p4, p5, boxes, batch_index)
    grey = ReduceMean <keepdims: int = 0> (pooled, one)
    kind = Cast <to: int = 1> (labels)
    factor = Unsqueeze (kind, last)
    bright = Mul (grey, factor)
    masks = Div (bright, whole)
}
"""
# Each keypoint's heatmap is one colour channel of the image inside the box.
POSER = """
<ir_version: 10, opset_import: ["" : 18, "maskcast" : 1]>
poser (float[batch, 3, 16, 24] p2, float[batch, 3, 8, 12] p3, float[batch, 3, 4, 6] p4,
       float[batch, 3, 2, 3] p5, float[r, 4] boxes, int32[r] batch_index)
  => (float[r, 3, 56, 56] heatmaps)
<float part = {0.1}>
{
    pooled = maskcast.MultiscaleRoiAlign <output_size: int = 56, sampling_ratio: int = 2,
        aligned: int = 0, plugin_namespace: string = "maskcast", plugin_version: string = "1">
        (p2, p3, p4, p5, boxes, batch_index)
    heatmaps = Mul (pooled, part)
}
"""
BOXES = ("boxes", "labels", "batch_index")
KEYPOINTS = Keypoints(("red", "green", "blue"), ((0, 1), (1, 2)))


def make_bundle(folder, with_masks=True, with_pose=False, **plan_changes):
    folder.mkdir()
    graphs, plans = {}, []
    texts = {"detector": DETECTOR}
    texts |= {"segmenter": SEGMENTER} if with_masks else {}
    texts |= {"poser": POSER} if with_pose else {}
    for name, text in texts.items():
        model = onnx.parser.parse_model(text)
        model.functions.extend(function_bodies(aligned=False) if name != "detector" else [])
        onnx.save(model, folder / f"{name}.onnx")
        (folder / f"{name}.plan").write_bytes(b"a plan")
        graphs[name] = GraphFile(f"{name}.onnx", sha256(folder / f"{name}.onnx"))
        plan = Plan(
            graph=name,
            file=f"{name}.plan",
            sha256=sha256(folder / f"{name}.plan"),
            package="tensorrt_rtx",
            version="1.0",
            capabilities=("8.9",),
            precision="fp32",
            height=HEIGHT,
            width=WIDTH,
            max_batch=MAX_BATCH,
            max_boxes=0 if name == "detector" else 3 * MAX_BATCH,
            graph_sha256=graphs[name].sha256,
            plugins={"MultiscaleRoiAlign": "1"},
        )
        plans.append(replace(plan, **plan_changes))
    manifest = Manifest(
        name="double",
        backend="tensorrt_rtx",
        precision="fp32",
        labels=("background", "bright", "dark"),
        input=FixedInput(HEIGHT, WIDTH),
        graphs=Graphs(**graphs),
        keypoints=KEYPOINTS if with_pose else None,
        keypoint_blur_cells=4.0 if with_pose else 0.0,
        plans=tuple(plans),
    )
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return open_bundle(folder)


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class ElementType(Enum):
    FLOAT = np.float32
    INT32 = np.int32
    INT64 = np.int64


class HostEngine:
    """TensorRT's ``ICudaEngine``, over an onnxruntime session.

    Its optimisation profiles are those that the builder makes: every shape, then the usual ones.
    """

    def __init__(self, session):
        self.session = session
        most = 3 * MAX_BATCH
        if any(value.name == "images" for value in session.get_inputs()):
            self.profiles = ({"images": (1, MAX_BATCH)}, {"images": (1, 1)})
        else:
            self.profiles = tuple({"images": (1, MAX_BATCH), "boxes": (1, n)} for n in (most, 8))
        self.num_optimization_profiles = len(self.profiles)
        inputs = [(value, Mode.INPUT) for value in session.get_inputs()]
        self.tensors = inputs + [(value, Mode.OUTPUT) for value in session.get_outputs()]
        self.by_name = {value.name: (value, mode) for value, mode in self.tensors}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i):
        return self.tensors[i][0].name

    def get_tensor_mode(self, name):
        return self.by_name[name][1]

    def get_tensor_dtype(self, name):
        kind = self.by_name[name][0].type
        return {
            "tensor(float)": ElementType.FLOAT,
            "tensor(int32)": ElementType.INT32,
            "tensor(int64)": ElementType.INT64,
        }[kind]

    def get_tensor_profile_shape(self, name, index):
        least, most = self.profiles[index]["boxes" if name in BOXES else "images"]
        rest = self.get_tensor_shape(name)[1:]
        return [(least, *rest), (most, *rest), (most, *rest)]

    def get_tensor_shape(self, name):
        return [side if isinstance(side, int) else -1 for side in self.by_name[name][0].shape]


class HostContext:
    """TensorRT's ``IExecutionContext``: its work is queued on the stream like any other."""

    HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def __init__(self, engine, profile):
        self.engine, self.session, self.profile = engine, engine.session, profile
        self.shapes, self.addresses = {}, {}
        self.errors, self.runs, self._waiting = [], 0, []
        self.refuses, self.is_capturable = False, True
        self.asked, self.seen, self.set_calls = 0, [], 0
        self.before_run = None
        self._driver = ctypes.CDLL("libcuda.so.1")

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.set_calls += 1
        self.shapes[name] = tuple(shape)
        return least[0] <= shape[0] <= most[0] and shape[1:] == least[1:] == most[1:]

    def set_tensor_address(self, name, address):
        self.set_calls += 1
        self.addresses[name] = address
        return name in self.engine.by_name

    def is_stream_capturable(self, stream):
        return self.is_capturable

    def execute_async_v3(self, stream):
        self.asked += 1
        self.seen.append(dict(self.shapes))
        if self.refuses or set(self.addresses) != set(self.engine.by_name):
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        function = self.HOST_FUNCTION(lambda _: self._run(shapes, addresses))
        self._waiting.append(function)
        status = self._driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None)
        return status == 0

    def _run(self, shapes, addresses):
        try:
            if self.before_run:
                self.before_run()
            inputs = {name: self._at(addresses[name], name, shapes[name]) for name in shapes}
            if "batch_index" in inputs:  # the portable operator takes no boxes without an image
                inputs["batch_index"] = np.maximum(inputs["batch_index"], 0)
            names = [value.name for value in self.session.get_outputs()]
            for name, array in zip(names, self.session.run(names, inputs), strict=True):
                self._at(addresses[name], name, array.shape)[...] = array
            self.runs += 1
        except Exception as error:
            self.errors.append(error)

    def _at(self, address, name, shape):
        dtype = np.dtype(self.engine.get_tensor_dtype(name).value)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(path), options)


class Doubles:
    """Opens a bundle's plans as doubles, and remembers them."""

    def __init__(self):
        self.contexts, self.warmed = {}, []
        self.is_capturable, self.one_profile = True, False

    def all_contexts(self):
        return [context for contexts in self.contexts.values() for context in contexts]

    def __call__(self, bundle, capability, names):
        assert capability == (8, 9)
        for path in (getattr(bundle, name) for name in names):
            engine = HostEngine(session(path))
            if self.one_profile:
                engine.num_optimization_profiles = 1
            contexts = [HostContext(engine, i) for i in range(engine.num_optimization_profiles)]
            for context in contexts:
                context.is_capturable = self.is_capturable
            self.contexts[path.stem] = contexts
            yield LoadedPlan(engine, contexts, path.stem, partial(self.warmed.append, path.stem))
