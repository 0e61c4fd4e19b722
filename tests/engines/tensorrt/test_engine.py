"""The GPU engine on the host driver: real pycuda and kernels; only TensorRT is a double."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from host_tensorrt import HEIGHT, MAX_BATCH, WIDTH, Doubles, make_bundle, session
from msgspec.structs import replace
from parity import assert_refuses_calls_when_closed

from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage
from maskcast.engines.tensorrt.device import Gpu, Stream
from maskcast.engines.tensorrt.engine import TensorRTEngine
from maskcast.engines.tensorrt.plan import DeviceError, open_plans, unavailable_reason
from maskcast.engines.tensorrt.steps import buckets

pytestmark = pytest.mark.host_gpu

FEATURES = ("p2", "p3", "p4", "p5")


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def doubles():
    return Doubles()


@pytest.fixture
def engine(host_driver, bundle, doubles):
    engine = TensorRTEngine(bundle, open_plans=doubles)
    yield engine
    engine.close()
    assert [error for context in doubles.all_contexts() for error in context.errors] == []


def make_images(count, seed=0):
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        content = (HEIGHT - 2 * i, WIDTH - 3 * i)
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[: content[0], : content[1]] = rng.integers(120, 256, (*content, 3))
        images.append(NetworkImage(pixels, content, (content[0] * 10, content[1] * 10)))
    return images


def reference(bundle, images, min_score, *, pose=False):
    """Compute the engine's results with onnxruntime, one image at a time."""
    from maskcast.engines.engine import Detections, keep_detections, to_instances
    from maskcast.engines.instances.keypoints import decode_heatmaps

    found = []
    for image in images:
        planar = image.pixels.transpose(2, 0, 1)[None].astype("f4")
        sizes = np.array([image.content], "f4")
        outputs = session(bundle.detector).run(None, {"images": planar, "sizes": sizes})
        kept = keep_detections(*outputs[:3], min_score)
        masks = None
        if bundle.segmenter:
            given = dict(zip(FEATURES, outputs[4:], strict=True))
            given |= {"boxes": kept["boxes"], "labels": kept["labels"].astype("i8")}
            masks = session(bundle.segmenter).run(
                None, given | {"batch_index": kept["image_index"]}
            )[0]
        batch = Detections(images=[image], **kept, features=None, release=lambda: None)
        if pose:
            given = dict(zip(FEATURES, outputs[4:], strict=True)) | {"boxes": kept["boxes"]}
            (heatmaps,) = session(bundle.poser).run(
                None, given | {"batch_index": kept["image_index"]}
            )
            batch.keypoints = decode_heatmaps(
                heatmaps, kept["boxes"], bundle.manifest.keypoint_blur_cells
            )
        found += to_instances(batch, masks)
    return found


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-6)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.width, one.height) == (other.width, other.height)
        if other.masks is not None:
            np.testing.assert_allclose(one.masks.astype(int), other.masks.astype(int), atol=1)
        assert (one.keypoints is None) == (other.keypoints is None)
        if other.keypoints is not None:
            np.testing.assert_allclose(one.keypoints, other.keypoints, rtol=1e-4)


def runs(doubles, name):
    return sum(context.runs for context in doubles.contexts[name])


@pytest.mark.parametrize("count", [1, 2, MAX_BATCH])
def test_a_batch_gives_what_its_images_give_alone(engine, bundle, count):
    images = make_images(count)
    found = engine.segment(engine.detect(images, 0.1))
    wanted = reference(bundle, images, 0.1)
    assert [len(one) for one in wanted] == [2] * count
    assert_same(found, wanted)


def test_batches_of_changing_size_follow_one_another(engine, bundle):
    for seed, count in enumerate((4, 1, 3, 2, 1)):
        images = make_images(count, seed)
        found = engine.segment(engine.detect(images, 0.1))
        assert_same(found, reference(bundle, images, 0.1))


def test_nothing_found_runs_no_segmenter(engine, doubles):
    before = runs(doubles, "segmenter")
    found = engine.segment(engine.detect(make_images(2), 0.99))
    assert [len(one) for one in found] == [0, 0]
    assert found[0].masks.shape == (0, 28, 28)
    assert runs(doubles, "segmenter") == before


def test_a_model_without_a_mask_branch_passes_through(host_driver, tmp_path, doubles):
    bundle = make_bundle(tmp_path / "boxes", with_masks=False)
    engine = TensorRTEngine(bundle, open_plans=doubles)
    images = make_images(2)
    found = engine.segment(engine.detect(images, 0.1))
    assert_same(found, reference(bundle, images, 0.1))
    assert found[0].masks is None
    engine.close()


@pytest.fixture
def posing_bundle(tmp_path):
    return make_bundle(tmp_path / "posing", with_pose=True)


@pytest.fixture
def posing_engine(host_driver, posing_bundle, doubles):
    engine = TensorRTEngine(posing_bundle, open_plans=doubles, pose=True)
    yield engine
    engine.close()
    assert [error for context in doubles.all_contexts() for error in context.errors] == []


def test_poses_of_a_batch_are_those_of_its_images_alone(posing_engine, posing_bundle):
    for seed, count in enumerate((2, 1, MAX_BATCH)):
        images = make_images(count, seed)
        found = posing_engine.run(images, 0.1)
        assert found[0].keypoints.shape == (2, 3, 3)
        assert_same(found, reference(posing_bundle, images, 0.1, pose=True))


def test_poses_wait_for_features_that_a_later_batch_does_not_overwrite(
    posing_engine, posing_bundle
):
    batches = [make_images(2, seed) for seed in range(3)]
    held = [posing_engine.detect(batch, 0.1) for batch in batches]  # the whole ring
    for batch, detections in reversed(list(zip(batches, held, strict=True))):
        found = posing_engine.segment(posing_engine.estimate_pose(detections))
        assert_same(found, reference(posing_bundle, batch, 0.1, pose=True))


def test_nothing_found_runs_no_poser(posing_engine, doubles):
    before = runs(doubles, "poser")
    found = posing_engine.run(make_images(2), 0.99)
    assert [one.keypoints.shape for one in found] == [(0, 3, 3)] * 2
    assert runs(doubles, "poser") == before


def test_a_pose_launches_one_cuda_graph_and_downloads_only_heatmaps(
    posing_engine, host_driver, doubles
):
    asked = [context.asked for context in doubles.contexts["poser"]]
    detections = posing_engine.detect(make_images(2), 0.1)
    before = host_driver.report()
    posing_engine.estimate_pose(detections)
    after = host_driver.report()
    detections.release()
    assert after["graph launches"] - before["graph launches"] == 1
    assert after["bytes up"] - before["bytes up"] == blocks(4 * 16, 4 * 4)
    assert after["bytes down"] - before["bytes down"] == blocks(4 * 3 * 56 * 56 * 4)
    assert [context.asked for context in doubles.contexts["poser"]] == asked


def test_a_poser_that_is_not_requested_is_not_loaded(host_driver, posing_bundle, doubles):
    engine = TensorRTEngine(posing_bundle, open_plans=doubles)
    assert set(doubles.contexts) == {"detector", "segmenter"}
    images = make_images(2)
    assert_same(engine.run(images, 0.1), reference(posing_bundle, images, 0.1))
    detections = engine.detect(images, 0.1)
    with pytest.raises(RuntimeError, match="pose=True"):
        engine.estimate_pose(detections)
    detections.release()
    engine.close()


def test_a_bundle_without_a_plan_of_its_poser_says_how_to_build_one(host_driver, posing_bundle):
    manifest = replace(posing_bundle.manifest, plans=posing_bundle.manifest.plans[:2])
    bundle = type(posing_bundle)(posing_bundle.path, manifest)
    with pytest.raises(InputError, match="no TensorRT plan of the poser; build one"):
        list(open_plans(bundle, (8, 9), ("poser",)))


def blocks(*sizes):
    return sum(-(-size // 256) * 256 for size in sizes)


def test_images_are_uploaded_as_bytes_and_only_boxes_and_crops_downloaded(engine, host_driver):
    before = host_driver.report()
    engine.segment(engine.detect(make_images(2), 0.1))
    after = host_driver.report()
    # Two boxes per image. Each array in a copy is rounded up to 256 bytes.
    down = blocks(2 * 3 * 16, 2 * 3 * 4, 2 * 3 * 8) + blocks(4 * 28 * 28)
    up = 2 * HEIGHT * WIDTH * 3 + blocks(2 * 8) + blocks(4 * 16, 4 * 8, 4 * 4)
    assert after["bytes down"] - before["bytes down"] == down
    assert after["bytes up"] - before["bytes up"] == up
    assert after["launches of preprocess"] == 1


def test_a_running_engine_allocates_nothing(engine, host_driver):
    def alive():
        return {
            n: c
            for n, c in host_driver.report().items()
            if "launches" not in n and "bytes" not in n
        }

    before = alive()
    for seed in range(3):
        engine.segment(engine.detect(make_images(2, seed), 0.1))
    assert alive() == before


def test_detection_and_masks_overlap_from_two_threads(engine, bundle):
    batches = [make_images(1 + i % MAX_BATCH, seed=i) for i in range(12)]
    waiting, found = queue.SimpleQueue(), []

    def segment():
        while (detections := waiting.get()) is not None:
            found.append(engine.segment(detections))

    thread = threading.Thread(target=segment)
    thread.start()
    for batch in batches:
        waiting.put(engine.detect(batch, 0.1))
    waiting.put(None)
    thread.join()
    for batch, instances in zip(batches, found, strict=True):
        assert_same(instances, reference(bundle, batch, 0.1))


def test_detections_keep_their_features_until_they_are_segmented(engine, bundle):
    batches = [make_images(2, seed) for seed in range(3)]
    held = [engine.detect(batch, 0.1) for batch in batches]  # the whole ring
    for batch, detections in reversed(list(zip(batches, held, strict=True))):
        assert_same(engine.segment(detections), reference(bundle, batch, 0.1))


def test_a_full_ring_blocks_until_detections_are_released(engine):
    held = [engine.detect(make_images(1), 0.1) for _ in range(3)]
    done = threading.Event()

    def detect():
        engine.detect(make_images(1), 0.1).release()
        done.set()

    thread = threading.Thread(target=detect)
    thread.start()
    assert not done.wait(0.2)
    held[0].release()
    held[0].release()  # a second time is harmless: it frees no second slot
    assert done.wait(60)
    thread.join()
    for detections in held[1:]:
        detections.release()


def test_prefetched_images_give_the_same_results(engine, bundle, host_driver):
    batches = [make_images(1 + i % MAX_BATCH, seed=i) for i in range(6)]
    for image in batches[0]:
        engine.prefetch(image)
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        for image in following:
            engine.prefetch(image)
        before = host_driver.report()["bytes up"]
        detections = engine.detect(batch, 0.1)
        assert host_driver.report()["bytes up"] - before == 256  # their sizes alone
        assert_same(engine.segment(detections), reference(bundle, batch, 0.1))


def test_the_next_batch_is_uploaded_while_one_is_detected(engine, bundle, doubles, host_driver):
    now, following = make_images(2, seed=1), make_images(2, seed=2)
    computing, go_on = threading.Event(), threading.Event()

    def block():
        computing.set()
        assert go_on.wait(60)

    for context in doubles.contexts["detector"]:
        context.before_run = block
    found = []
    thread = threading.Thread(target=lambda: found.append(engine.detect(now, 0.1)))
    thread.start()
    assert computing.wait(60)
    before = host_driver.report()["bytes up"]
    for image in following:
        engine.prefetch(image)  # does not wait for the GPU
    assert host_driver.report()["bytes up"] - before == 2 * HEIGHT * WIDTH * 3
    assert not found
    ring = engine._images  # the batch's slots cannot be written until it is done
    assert len(ring._free) + len(ring._ahead) == 2 * MAX_BATCH + 1 - len(now)
    for context in doubles.contexts["detector"]:
        context.before_run = None
    go_on.set()
    thread.join()
    assert len(ring._free) + len(ring._ahead) == 2 * MAX_BATCH + 1
    assert_same(engine.segment(found[0]), reference(bundle, now, 0.1))
    assert_same(engine.segment(engine.detect(following, 0.1)), reference(bundle, following, 0.1))


def test_images_that_are_never_detected_give_their_slots_to_later_ones(engine, bundle, host_driver):
    for seed in range(3):
        for image in make_images(MAX_BATCH, seed=seed):
            engine.prefetch(image)
    late = make_images(MAX_BATCH, seed=9)
    for image in (*late, late[0]):  # a second time is harmless
        engine.prefetch(image)
    before = host_driver.report()["bytes up"]
    detections = engine.detect(late, 0.1)
    assert host_driver.report()["bytes up"] - before == 256
    assert_same(engine.segment(detections), reference(bundle, late, 0.1))


def test_one_image_may_be_several_of_a_batch(engine, bundle):
    images = make_images(1) * MAX_BATCH
    engine.prefetch(images[0])
    assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))


@pytest.mark.parametrize("ahead", [True, False])
def test_an_upload_that_detection_does_not_wait_for_is_detected(engine, bundle, monkeypatch, ahead):
    images = make_images(1)
    (wanted,) = reference(bundle, images, 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "follow", lambda self, event: None)
        if ahead:
            engine.prefetch(images[0])
        (found,) = engine.segment(engine.detect(images, 0.1))
    assert not np.allclose(found.scores, wanted.scores, rtol=1e-3)
    assert_same(engine.segment(engine.detect(images, 0.1)), [wanted])


def test_a_missing_synchronisation_is_detected(engine, bundle, monkeypatch):
    images = make_images(1)
    monkeypatch.setattr(Stream, "wait", lambda self: None)
    found = engine.detect(images, 0.1)
    found.release()
    (wanted,) = reference(bundle, images, 0.1)
    assert len(found.scores) != len(wanted)


def test_a_device_that_fails_while_running_stops_the_stage_and_frees_its_slot(
    engine, bundle, host_driver
):
    engine.segment(engine.detect(make_images(1), 0.1))
    waiting = engine.detect(make_images(1), 0.1)
    host_driver.break_down()
    for _ in range(5):  # more often than there are slots
        with pytest.raises(DeviceError, match="the GPU failed to"):
            engine.detect(make_images(1), 0.1)
    for _ in range(3 * MAX_BATCH):  # more often than there are slots for images
        with pytest.raises(DeviceError, match="the GPU failed to upload"):
            engine.prefetch(make_images(1)[0])
    with pytest.raises(DeviceError, match="the GPU failed to"):
        engine.segment(waiting)
    host_driver.break_down(0)
    images = make_images(2)
    assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))


def test_every_call_launches_one_cuda_graph_and_copies_once_each_way(engine, host_driver, doubles):
    asked = [context.asked for context in doubles.all_contexts()]
    before = host_driver.report()["graph launches"]
    for count in (1, 2, MAX_BATCH):
        engine.segment(engine.detect(make_images(count), 0.1))
    assert host_driver.report()["graph launches"] - before == 6
    # TensorRT is not called again.
    assert [context.asked for context in doubles.all_contexts()] == asked


def test_without_cuda_graphs_the_results_are_the_same(host_driver, bundle, doubles):
    host_driver.refuse_capture()
    engine = TensorRTEngine(bundle, open_plans=doubles)
    for seed, count in enumerate((2, 1, MAX_BATCH)):
        images = make_images(count, seed)
        assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))
    assert host_driver.report()["graph launches"] == 0
    engine.close()


def test_a_plan_that_cannot_be_captured_yet_runs_without_a_graph(host_driver, bundle, doubles):
    doubles.is_capturable = False
    engine = TensorRTEngine(bundle, open_plans=doubles)
    images = make_images(2)
    assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))
    assert host_driver.report()["graph launches"] == 0
    engine.close()


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(1, (1,)), (2, (1, 2)), (12, (1, 2, 4, 8, 12)), (100, (1, 2, 4, 8, 16, 32, 64, 100))],
)
def test_boxes_are_padded_to_a_few_fixed_numbers(most, wanted):
    assert buckets(most) == wanted


def test_each_shape_runs_once_at_the_start_on_the_most_specific_profile(engine, doubles):
    any_batch, one_image = doubles.contexts["detector"]
    assert {shapes["images"][0] for shapes in one_image.seen} == {1}
    assert {shapes["images"][0] for shapes in any_batch.seen} == set(range(2, MAX_BATCH + 1))
    any_boxes, few_boxes = doubles.contexts["segmenter"]
    assert {shapes["boxes"][0] for shapes in few_boxes.seen} == {1, 2, 4, 8}
    assert {shapes["boxes"][0] for shapes in any_boxes.seen} == {12}
    assert {shapes["p2"][0] for shapes in (*few_boxes.seen, *any_boxes.seen)} == {MAX_BATCH}
    assert doubles.warmed == ["detector", "segmenter"]


def test_a_plan_with_one_profile_runs_every_shape_on_it(host_driver, bundle, doubles):
    doubles.one_profile = True
    engine = TensorRTEngine(bundle, open_plans=doubles)
    (detector,), (segmenter,) = doubles.contexts["detector"], doubles.contexts["segmenter"]
    assert {shapes["images"][0] for shapes in detector.seen} == set(range(1, MAX_BATCH + 1))
    assert {shapes["boxes"][0] for shapes in segmenter.seen} == {1, 2, 4, 8, 12}
    for count in (1, 3):
        images = make_images(count)
        assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))
    engine.close()


def test_a_shape_that_no_profile_takes_is_refused(engine):
    with pytest.raises(
        DeviceError, match=r"the detector was not built for images \(5, 3, 64, 96\)"
    ):
        engine._detect_step.plan.prepare({"images": (5, 3, 64, 96), "sizes": (5, 2)}, {})


def test_the_plans_are_found_by_name_in_any_order(host_driver, bundle, doubles):
    manifest = replace(bundle.manifest, plans=bundle.manifest.plans[::-1])
    engine = TensorRTEngine(type(bundle)(bundle.path, manifest), open_plans=doubles)
    images = make_images(2)
    assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))
    engine.close()


def test_a_bundle_without_a_plan_of_the_segmenter_says_how_to_build_it(bundle, monkeypatch):
    monkeypatch.setattr("maskcast.engines.tensorrt.plan._open", lambda *_: "opened")
    manifest = replace(bundle.manifest, plans=bundle.manifest.plans[:1])
    with pytest.raises(InputError, match=r"no TensorRT plan of the segmenter; build one"):
        list(open_plans(type(bundle)(bundle.path, manifest), (8, 9), ("detector", "segmenter")))


@pytest.mark.parametrize("spin", [False, True])
def test_waiting_may_sleep_or_spin(host_driver, bundle, doubles, spin):
    engine = TensorRTEngine(bundle, open_plans=doubles, spin=spin)
    images = make_images(1)
    assert_same(engine.segment(engine.detect(images, 0.1)), reference(bundle, images, 0.1))
    assert host_driver.blocking_events(blocking=spin) == 0
    assert host_driver.blocking_events(blocking=not spin) > 0
    engine.close()


def test_a_closed_engine_says_so(host_driver, bundle, doubles):
    engine = TensorRTEngine(bundle, open_plans=doubles)
    assert_refuses_calls_when_closed(engine, make_images(1))


@pytest.fixture
def plain_engine(host_driver, bundle, doubles):
    """An engine without CUDA graphs, so that TensorRT is called for every batch."""
    host_driver.refuse_capture()
    engine = TensorRTEngine(bundle, open_plans=doubles)
    yield engine
    engine.close()


def refuse(contexts, refuses=True):
    for context in contexts:
        context.refuses = refuses


def test_tensorrt_is_given_only_the_addresses_that_differ(plain_engine, doubles):
    images = make_images(1)
    plain_engine.segment(plain_engine.detect(images, 0.1))
    before = [context.set_calls for context in doubles.all_contexts()]
    for _ in range(3):  # each in the next slot
        plain_engine.segment(plain_engine.detect(images, 0.1))
    after = [context.set_calls for context in doubles.all_contexts()]
    _, one_image, _, few_boxes = (now - then for now, then in zip(after, before, strict=True))
    assert (one_image, few_boxes) == (3 * len(FEATURES), 3 * len(FEATURES))


def test_a_plan_that_tensorrt_does_not_run_is_an_error_of_the_device(plain_engine, doubles):
    engine = plain_engine
    refuse(doubles.contexts["detector"])
    with pytest.raises(DeviceError, match="the detector could not be run"):
        engine.detect(make_images(1), 0.1)
    refuse(doubles.contexts["detector"], False)
    refuse(doubles.contexts["segmenter"])
    with pytest.raises(DeviceError, match="the segmenter could not be run"):
        engine.segment(engine.detect(make_images(1), 0.1))


@pytest.mark.parametrize("count", [0, MAX_BATCH + 1])
def test_a_batch_of_a_size_that_the_plan_does_not_take_is_refused(engine, count):
    with pytest.raises(ValueError, match="1 to 4"):
        engine.detect(make_images(1) * count, 0.1)


def test_an_image_of_another_size_is_refused(engine):
    image = NetworkImage(np.zeros((32, 32, 3), np.uint8), (32, 32), (32, 32))
    with pytest.raises(ValueError, match=r"\(64, 96\)"):
        engine.detect([image], 0.1)


def test_too_little_memory_is_reported_and_nothing_stays_allocated(
    host_driver, bundle, doubles, monkeypatch
):
    monkeypatch.setattr(Gpu, "free_bytes", lambda self: 100_000)
    with pytest.raises(InputError, match=r"0 MB free.*smaller --size or --batch"):
        TensorRTEngine(bundle, open_plans=doubles)


def test_a_driver_that_cannot_load_the_kernels_is_named(host_driver, tmp_path, bundle):
    host_driver.set_version(12080)
    with pytest.raises(InputError, match=r"driver supports CUDA 12\.8.*need 13\.0.*580 series"):
        TensorRTEngine(bundle, open_plans=Doubles())
    assert "580 series" in (unavailable_reason(bundle) or "")


def test_closing_twice_is_harmless(host_driver, bundle, doubles):
    engine = TensorRTEngine(bundle, open_plans=doubles)
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.1"}, "built with tensorrt_rtx 0.1"),
        ({"version": None, "capabilities": ("12.0",)}, "for compute capability 12.0.*has 8.9"),
        ({"version": None, "graph_sha256": "0" * 64}, "the bundle's detector has changed"),
    ],
)
def test_a_plan_that_does_not_fit_says_how_to_build_it_again(
    host_driver, tmp_path, changes, reason
):
    trt = pytest.importorskip("tensorrt_rtx")
    changes = {key: value or trt.__version__ for key, value in changes.items()}
    bundle = make_bundle(tmp_path / "incompatibility", **changes)
    with pytest.raises(InputError, match=rf"{reason}.*`maskcast build .* --size 64x96 --batch 4"):
        TensorRTEngine(bundle)


def test_a_plan_without_memory_to_run_in_is_an_input_error(host_driver, tmp_path, monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx")
    engine = SimpleNamespace(device_memory_size_v2=300_000_000)
    opened = SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    monkeypatch.setattr("maskcast.engines.tensorrt.plan.runtime", lambda trt: opened)
    monkeypatch.setattr(
        "maskcast.engines.tensorrt.plan.make_contexts", lambda *_: (["context", None], None)
    )
    bundle = make_bundle(tmp_path / "large", version=trt.__version__)
    with pytest.raises(InputError, match=r"too little memory, 300 MB.*smaller --size or --batch"):
        TensorRTEngine(bundle)


def test_a_bundle_without_plans_says_how_to_build_one(tmp_path, bundle):
    bundle = type(bundle)(bundle.path, replace(bundle.manifest, plans=()))
    with pytest.raises(InputError, match="maskcast build"):
        TensorRTEngine(bundle)
    with pytest.raises(InputError, match="maskcast build"):
        list(open_plans(bundle, (8, 9), ("detector", "segmenter")))
    assert unavailable_reason(bundle) == "the bundle has no TensorRT plan"
