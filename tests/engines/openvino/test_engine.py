from __future__ import annotations

import copy
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from parity import assert_refuses_calls_when_closed
from PIL import Image

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import Instances
from maskcast.engines.load import predict
from maskcast.engines.onnxruntime import OnnxRuntimeEngine
from maskcast.engines.openvino.engine import OpenVinoEngine, has_bf16, openvino_core

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU does not compute in bf16")


def in_bf16(bundle: Bundle) -> Bundle:
    return Bundle(bundle.path, replace(bundle.manifest, precision="bf16"))


@pytest.fixture(scope="module")
def engine(calibrated_bundle: Bundle) -> OpenVinoEngine:
    return OpenVinoEngine(calibrated_bundle)


@pytest.fixture(scope="module")
def small_engine(unthresholded_bundle: Bundle) -> Iterator[OpenVinoEngine]:
    """The default model without a score threshold: 100 detections in any image."""
    engine = OpenVinoEngine(unthresholded_bundle)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def default_network(parity: Any) -> Any:
    network = copy.deepcopy(parity.default_network)
    network.roi_heads.score_thresh = 0.0
    return network


def see(engine: OpenVinoEngine, image: NetworkImage, min_score: float = 0.0) -> Instances:
    (instances,) = engine.segment(engine.detect([image], min_score))
    return instances


def overlap(one: Any, other: Any) -> float:
    """Return the IoU of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    areas = sum(np.prod(box[2:] - box[:2]) for box in (one, other))
    return float(shared / (areas - shared))


def test_results_match_torchvision(engine: OpenVinoEngine, parity: Any) -> None:
    for rgb, truth in parity.truths:
        found = see(engine, parity.fit(rgb))
        truth.assert_seen(found.boxes, found.scores, found.labels, found.masks / 255)


@pytest.mark.parametrize(("height", "width"), [(288, 512), (384, 500), (512, 203), (64, 64)])
def test_results_of_the_default_model_match_torchvision(
    small_engine: OpenVinoEngine, default_network: Any, parity: Any, height: int, width: int
) -> None:
    rgb = parity.draw_image(height, width, seed=height)
    truth = parity.see_with_torchvision(default_network, rgb)
    found = see(small_engine, parity.fit(rgb))
    truth.assert_seen(found.boxes, found.scores, found.labels, found.masks / 255)


@pytest.mark.skipif("MASKCAST_PHOTOS" not in os.environ, reason="MASKCAST_PHOTOS names no folder")
def test_results_on_photographs_match_torchvision(
    small_engine: OpenVinoEngine, default_network: Any, parity: Any
) -> None:
    photos = sorted(Path(os.environ["MASKCAST_PHOTOS"]).rglob("*.jpg"))[:10]
    seen = 0
    for path in photos:
        rgb = np.array(Image.open(path).convert("RGB"))
        truth = parity.see_with_torchvision(default_network, rgb)
        found = see(small_engine, parity.fit(rgb))
        truth.assert_seen(found.boxes, found.scores, found.labels, found.masks / 255)
        seen += len(found)
    assert seen


@needs_bf16
def test_bf16_stays_near_fp32(
    small_engine: OpenVinoEngine, unthresholded_bundle: Bundle, parity: Any
) -> None:
    image = parity.fit(parity.draw_image(288, 512, seed=288))
    coarse_engine = OpenVinoEngine(in_bf16(unthresholded_bundle))
    exact, coarse = (engine.detect([image], 0.0) for engine in (small_engine, coarse_engine))
    from maskcast.engines.openvino.compiled import levels

    tables = [one.features[0].features.data for one in (exact, coarse)]
    ends = np.cumsum([rows * columns for rows, columns in levels((288, 512)).values()])
    for level in zip(*(np.split(table, ends[:-1]) for table in tables), strict=True):
        expected, found = level
        difference = found - expected
        assert 0 < np.sqrt((difference**2).mean()) < 0.05 * np.sqrt((expected**2).mean())
    best = [overlap(exact.boxes[0], box) for box in coarse.boxes]
    assert max(best) > 0.8
    exact.release()
    coarse.release()


@needs_bf16
def test_bf16_pools_where_fp32_pools(calibrated_bundle: Bundle) -> None:
    # Coordinates stay fp32: far right in a wide image a bfloat16 would be off by 4 pixels.
    import openvino as ov

    from maskcast.engines.openvino.compiled import Graph, split
    from maskcast.engines.openvino.operators import read_graph

    assert calibrated_bundle.segmenter is not None
    masks = []
    for precision in ("f32", "bf16"):
        model = read_graph(calibrated_bundle.segmenter)
        features = {f"p{n}": [1, 256, 256 >> n, 1280 >> n] for n in range(2, 6)}
        model.reshape(features | {"boxes": [2, 4], "labels": [2], "batch_index": [2]})
        request = Graph.compile(ov.Core(), split(model, precision)).request()
        ramp = {}
        for name, (_, channels, rows, columns) in features.items():
            x = np.linspace(0, 20, columns, dtype=np.float32)
            wave = np.sin(x[None] * np.arange(1, channels + 1)[:, None] / 20)
            ramp[name] = np.broadcast_to(wave[None, :, None], (1, channels, rows, columns))
        for name, level in ramp.items():
            request.set_input(name, ov.Tensor(np.ascontiguousarray(level, np.float32)))
        boxes = np.array([[1213.3, 40.2, 1250.9, 90.7], [1101.7, 3.3, 1279.1, 60.9]], np.float32)
        request.set_input("boxes", ov.Tensor(boxes))
        request.set_input("labels", ov.Tensor(np.array([1, 2], np.int64)))
        request.set_input("batch_index", ov.Tensor(np.zeros(2, np.int32)))
        request.infer()
        masks.append(request.output("masks").data.copy())
    assert np.abs(masks[0] - masks[1]).mean() < 0.01


def test_boxes_below_the_minimum_score_are_dropped(
    small_engine: OpenVinoEngine, parity: Any
) -> None:
    image = parity.fit(parity.draw_image(288, 512, seed=288))
    everything = see(small_engine, image, 0.0)
    threshold = float(np.median(everything.scores))
    some = see(small_engine, image, threshold)
    assert len(some) == (everything.scores >= threshold).sum()
    nothing = see(small_engine, image, 1.1)
    assert nothing.masks is not None
    assert len(nothing) == 0
    assert nothing.masks.shape == (0, 28, 28)


def test_boxes_come_back_in_source_pixels(small_engine: OpenVinoEngine, parity: Any) -> None:
    image = parity.fit(parity.draw_image(288, 512, seed=288))
    larger = NetworkImage(image.pixels, image.content, (1080, 1920))
    near, far = see(small_engine, image), see(small_engine, larger)
    assert len(near)
    np.testing.assert_allclose(far.boxes, near.boxes * 3.75, rtol=1e-5)
    assert (far.width, far.height) == (1920, 1080)


def test_detect_and_segment_overlap_on_two_threads(
    small_engine: OpenVinoEngine, parity: Any
) -> None:
    images = [parity.fit(parity.draw_image(288, 512, seed=seed)) for seed in range(6)]
    alone = [see(small_engine, image) for image in images]
    with ThreadPoolExecutor(1) as masks:
        waiting = [
            masks.submit(small_engine.segment, small_engine.detect([image], 0.0))
            for image in images
        ]
        together = [future.result()[0] for future in waiting]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_array_equal(one.masks, other.masks)


def test_a_batch_in_throughput_mode_matches_latency_mode(
    unthresholded_bundle: Bundle, small_engine: OpenVinoEngine, parity: Any
) -> None:
    engine = OpenVinoEngine(unthresholded_bundle, "throughput")
    assert engine.max_batch == 2 * min(len(os.sched_getaffinity(0)), 4)
    images = [
        parity.fit(parity.draw_image(288, 512, seed=seed)) for seed in range(engine.max_batch)
    ]
    found = engine.segment(engine.detect(images, 0.0))
    for image, instances in zip(images, found, strict=True):
        alone = see(small_engine, image)
        np.testing.assert_allclose(instances.boxes, alone.boxes, atol=1e-3)
        assert np.abs(instances.masks.astype(int) - alone.masks).max() <= 1
    engine.close()


def test_throughput_mode_keeps_two_batches_in_flight(
    unthresholded_bundle: Bundle, parity: Any
) -> None:
    engine = OpenVinoEngine(unthresholded_bundle, "throughput")
    image = parity.fit(parity.draw_image(96, 160))
    held = [engine.detect([image] * engine.max_batch, 0.0) for _ in range(2)]
    boxes = [instances.boxes for one in held for instances in engine.segment(one)]
    assert len(boxes) == 2 * engine.max_batch
    for found in boxes:
        np.testing.assert_array_equal(found, boxes[0])
    engine.close()


def test_a_failure_on_one_stream_is_raised_when_no_stream_runs_any_more(
    unthresholded_bundle: Bundle, parity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    engine = OpenVinoEngine(unthresholded_bundle, "throughput")
    image = parity.fit(parity.draw_image(96, 160))
    engine.detect([image], 0.5).release()
    shape = engine._compiled(image.pixels.shape[:2]).result()
    free = shape.features.qsize()
    entered, leave, running = threading.Event(), threading.Event(), threading.Event()

    def fail(*_: Any) -> None:
        assert entered.wait(60)  # the other stream is at work
        threading.Timer(0.2, leave.set).start()
        raise ZeroDivisionError

    def block(*_: Any) -> Any:
        running.set()
        entered.set()
        assert leave.wait(60)
        running.clear()
        return {name: np.zeros((1, 1)) for name in ("boxes", "scores", "labels")}

    monkeypatch.setattr(shape.streams[0], "detect", fail)
    monkeypatch.setattr(shape.streams[1], "detect", block)
    with pytest.raises(ZeroDivisionError):
        engine.detect([image, image], 0.5)
    assert not running.is_set()
    assert shape.features.qsize() == free
    engine.close()


def test_a_batch_of_the_wrong_length_is_refused(small_engine: OpenVinoEngine, parity: Any) -> None:
    image = parity.fit(parity.draw_image(96, 160))
    for images in ([], [image, image]):
        with pytest.raises(ValueError, match="takes 1 to 1"):
            small_engine.detect(images, 0.5)


def test_a_closed_engine_raises(unthresholded_bundle: Bundle, parity: Any) -> None:
    image = parity.fit(parity.draw_image(96, 160))
    assert_refuses_calls_when_closed(OpenVinoEngine(unthresholded_bundle), [image])


def test_detect_waits_until_a_detection_is_released(
    small_engine: OpenVinoEngine, parity: Any
) -> None:
    image = parity.fit(parity.draw_image(288, 512, seed=288))
    held = [small_engine.detect([image], 0.5) for _ in range(2)]
    third = threading.Thread(target=lambda: small_engine.detect([image], 0.5).release())
    third.start()
    third.join(0.5)
    assert third.is_alive()
    held[0].release()
    held[0].release()  # twice is safe
    third.join(60)
    assert not third.is_alive()
    for detections in held[1:]:
        detections.release()
    assert len([small_engine.detect([image], 0.5).release() for _ in range(3)]) == 3


def test_the_number_of_compiled_shapes_is_limited(
    small_engine: OpenVinoEngine, parity: Any
) -> None:
    for width in range(64, 352, 32):
        see(small_engine, parity.fit(parity.draw_image(64, width)))
    assert len(small_engine._shapes) == 8
    first = see(small_engine, parity.fit(parity.draw_image(64, 64)))
    assert first.width == 64


def test_prepare_compiles_a_shape_before_it_is_used(
    unthresholded_bundle: Bundle, parity: Any
) -> None:
    engine = OpenVinoEngine(unthresholded_bundle)
    image = parity.fit(parity.draw_image(160, 160))
    size = image.pixels.shape[:2]
    assert not engine.prepare(*size)  # it compiles in the background
    deadline_s = time.monotonic() + 60
    while not engine.prepare(*size):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert len(see(engine, image)) == 100
    engine.close()


def test_other_threads_run_while_it_computes(small_engine: OpenVinoEngine, parity: Any) -> None:
    image = parity.fit(parity.draw_image(512, 512))
    see(small_engine, image)
    ticks, over = [0], threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks[0] += 1
            over.wait(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    during = []
    for _ in range(10):  # on a busy machine the other thread may get no core for one image
        before = ticks[0]
        small_engine.detect([image], 0.5).release()
        during.append(ticks[0] - before)
    over.set()
    ticker.join()
    assert max(during) >= 3


def test_bf16_without_support_of_the_cpu_warns_and_runs_in_fp32(
    unthresholded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskcast.engines.openvino.engine.has_bf16", lambda: False)
    with pytest.warns(UserWarning, match="fp32 is used"):
        engine = OpenVinoEngine(in_bf16(unthresholded_bundle))
    assert engine.device == "OpenVINO CPU fp32"


def test_all_engines_use_one_core_of_openvino(
    small_engine: OpenVinoEngine, unthresholded_bundle: Bundle
) -> None:
    # The process can abort when a core is freed while a thread that ran its graphs ends.
    engine = OpenVinoEngine(unthresholded_bundle)
    assert engine._core is small_engine._core is openvino_core()
    engine.close()


def test_a_model_without_masks_passes_through(unthresholded_bundle: Bundle, parity: Any) -> None:
    bundle = unthresholded_bundle
    boxes_only = replace(bundle.manifest, graphs=replace(bundle.manifest.graphs, segmenter=None))
    engine = OpenVinoEngine(Bundle(bundle.path, boxes_only))
    found = see(engine, parity.fit(parity.draw_image(288, 512, seed=288)))
    assert found.masks is None
    assert len(found)


def test_predict_accepts_an_image_of_any_size(small_engine: OpenVinoEngine) -> None:
    found = predict(np.zeros((37, 53, 3), np.uint8), small_engine)
    assert (found.width, found.height) == (53, 37)


def test_poses_match_torchvision(keypoint_bundle: Bundle, parity: Any) -> None:
    engine = OpenVinoEngine(keypoint_bundle, pose=True)
    for rgb, truth in parity.poses:
        mine = engine.detect([parity.fit(rgb)], min_score=0.0)
        given = dataclasses.replace(
            mine, boxes=truth.boxes, image_index=np.zeros(len(truth.boxes), np.int32)
        )
        found = engine.estimate_pose(given).keypoints
        mine.release()
        assert found is not None
        truth.assert_posed(found)
    engine.close()


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_poses_are_those_of_onnxruntime_for_any_number_of_boxes(
    posing_bundle: Bundle, parity: Any, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    reference = OnnxRuntimeEngine(posing_bundle, pose=True)
    engine = OpenVinoEngine(posing_bundle, mode, pose=True)
    images = [parity.fit(parity.draw_image(160, 224, seed)) for seed in range(3)]
    min_scores = (0.0, 0.05, 1.0)  # 100 boxes per image, some, none
    for min_score in min_scores:
        for batch in (images[:1], images[: engine.max_batch]):
            detections = reference.detect(batch, min_score)
            truth = reference.estimate_pose(detections).keypoints
            mine = engine.detect(batch, min_score)
            found = engine.estimate_pose(replace_boxes(mine, detections)).keypoints
            assert found is not None
            assert truth is not None
            assert found.shape == truth.shape == (len(detections.boxes), 17, 3)
            mine.release()
            if not len(found):
                continue
            # Two places of one heatmap may be almost equally high.
            apart = np.abs(found[..., :2] - truth[..., :2]).max(axis=2)
            assert (apart < 0.1).mean() > 0.995
            assert np.abs(found[..., 2] - truth[..., 2])[apart < 0.1].max() < 1e-3
    engine.close()


def replace_boxes(mine: Detections, other: Detections) -> Detections:
    """Return detections with the features of one and the boxes of the other."""
    return dataclasses.replace(
        mine,
        boxes=other.boxes,
        scores=other.scores,
        labels=other.labels,
        image_index=other.image_index,
    )


def test_keypoints_come_with_the_instances_that_they_belong_to(
    posing_bundle: Bundle, parity: Any
) -> None:
    engine = OpenVinoEngine(posing_bundle, pose=True)
    rgb = parity.draw_image(160, 224)
    found = predict(rgb, engine, 0.0)
    assert found.keypoints is not None
    assert found.keypoints.shape == (len(found), 17, 3)
    x, y, score = found.keypoints.transpose(2, 0, 1)
    for axis, low, high in ((x, 0, 2), (y, 1, 3)):
        assert (axis >= found.boxes[:, low, None] - 1e-3).all()
        # A box of less than a pixel counts as one pixel.
        assert (axis <= np.maximum(found.boxes[:, high], found.boxes[:, low] + 1)[:, None]).all()
    assert ((score >= 0) & (score <= 1)).all()
    engine.close()


def test_a_poser_that_is_not_requested_is_not_compiled(posing_bundle: Bundle, parity: Any) -> None:
    engine = OpenVinoEngine(posing_bundle)
    image = parity.fit(parity.draw_image(64, 64))
    detections = engine.detect([image], 0.0)
    with pytest.raises(RuntimeError, match="pose=True"):
        engine.estimate_pose(detections)
    (found,) = engine.segment(detections)
    assert found.keypoints is None
    engine.close()


@needs_bf16
def test_poses_in_bf16_lie_where_those_in_fp32_lie(posing_bundle: Bundle, parity: Any) -> None:
    image = parity.fit(parity.draw_image(160, 224))
    precise = OpenVinoEngine(posing_bundle, pose=True)
    engine = OpenVinoEngine(in_bf16(posing_bundle), pose=True)
    detections = precise.detect([image], 0.0)
    truth = precise.estimate_pose(detections).keypoints
    found = engine.estimate_pose(replace_boxes(engine.detect([image], 0.0), detections)).keypoints
    assert found is not None
    assert truth is not None
    apart = np.abs(found[..., :2] - truth[..., :2]).max(axis=2)
    assert np.median(apart) < 1
    for one in (engine, precise):
        one.close()
