import json

import numpy as np
import pytest

from maskcast.builder.evaluation.evaluate import Prediction, encode_masks, evaluate, torch_predictor
from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.dataset import InstanceDataset
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints

LABELS = ("blue", "red")


class Oracle:
    """Predicts the annotations of the images in their order, after a change."""

    def __init__(self, folder, change=lambda prediction: prediction) -> None:
        self.dataset = InstanceDataset(folder.images, folder.annotations, labels=LABELS)
        self.next, self.change = 0, change

    def __call__(self, image) -> Prediction:
        example = self.dataset.read(self.next)
        assert np.array_equal(example.image, image)
        self.next += 1
        scores = np.linspace(0.9, 0.8, len(example.boxes), dtype=np.float32)
        masks = encode_masks(example.masks == 1)
        return self.change(Prediction(example.boxes, scores, example.labels, masks))


def test_predicting_the_annotations_scores_one(draw_ellipses) -> None:
    folder = draw_ellipses()
    scores = evaluate(Oracle(folder), folder.images, folder.annotations, LABELS)
    assert scores["images"] == 4
    for kind in ("bbox", "segm"):
        assert scores[kind]["AP"] == pytest.approx(1.0)
        assert scores[kind]["AP50"] == pytest.approx(1.0)
    assert scores["segm"]["APl"] == -1


def test_shifted_masks_keep_box_ap_and_lose_mask_ap(draw_ellipses) -> None:
    folder = draw_ellipses()

    def shift(prediction: Prediction) -> Prediction:
        dataset = oracle.dataset.read(oracle.next - 1)
        assert dataset.masks is not None
        return prediction._replace(masks=encode_masks(np.roll(dataset.masks, 12, 2) == 1))

    oracle = Oracle(folder, shift)
    scores = evaluate(oracle, folder.images, folder.annotations, LABELS)
    assert scores["bbox"]["AP"] == pytest.approx(1.0)
    assert scores["segm"]["AP75"] < 0.5


def test_swapped_labels_score_zero(draw_ellipses) -> None:
    folder = draw_ellipses()
    oracle = Oracle(folder, lambda prediction: prediction._replace(labels=3 - prediction.labels))
    scores = evaluate(oracle, folder.images, folder.annotations, LABELS)
    assert scores["segm"]["AP"] == pytest.approx(0.0)


def test_finding_half_of_the_instances_halves_the_ap(draw_ellipses) -> None:
    folder = draw_ellipses()

    def first_only(p: Prediction) -> Prediction:
        return Prediction(p.boxes[:1], p.scores[:1], p.labels[:1], p.masks[:1])

    scores = evaluate(Oracle(folder, first_only), folder.images, folder.annotations, LABELS)
    assert scores["bbox"]["AP"] == pytest.approx(0.5)


def test_categories_that_the_predictor_does_not_know_are_not_scored(draw_ellipses) -> None:
    folder = draw_ellipses()

    def as_red(p: Prediction) -> Prediction:
        red = p.labels == 2
        masks = [m for m, is_red in zip(p.masks, red, strict=True) if is_red]
        return Prediction(p.boxes[red], p.scores[red], np.ones(red.sum(), np.int64), masks)

    scores = evaluate(Oracle(folder, as_red), folder.images, folder.annotations, ("red",))
    assert scores["segm"]["AP"] == pytest.approx(1.0)


def test_detections_in_a_crowd_do_not_lower_the_ap(draw_ellipses) -> None:
    folder = draw_ellipses()
    content = folder.content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 7)
    folder.write(content)
    whole = Oracle(copy_without_crowds(folder))
    scores = evaluate(whole, folder.images, folder.annotations, LABELS)
    assert scores["segm"]["AP"] == pytest.approx(1.0)


def copy_without_crowds(folder):
    """Return the same folder without crowds, for the oracle."""
    content = folder.content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    path = folder.annotations.with_name("all.json")
    path.write_text(json.dumps(content))
    return folder._replace(annotations=path)


def test_nothing_found_scores_zero(draw_ellipses) -> None:
    folder = draw_ellipses()

    def nothing(image) -> Prediction:
        return Prediction(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64), [])

    scores = evaluate(nothing, folder.images, folder.annotations, LABELS)
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 0


def test_a_limit_scores_the_first_images(draw_ellipses) -> None:
    folder = draw_ellipses()
    shown = []
    oracle = Oracle(folder)
    scores = evaluate(
        oracle,
        folder.images,
        folder.annotations,
        LABELS,
        limit=2,
        track=lambda entries: shown.extend(entries) or entries,
    )
    assert scores["images"] == oracle.next == len(shown) == 2
    assert scores["segm"]["AP"] == pytest.approx(1.0)


def test_annotations_without_masks_score_only_boxes(draw_ellipses) -> None:
    folder = draw_ellipses()
    scores = evaluate(Oracle(folder), folder.images, folder.boxes, LABELS)
    assert "segm" not in scores
    assert scores["bbox"]["AP"] == pytest.approx(1.0)


def test_a_single_annotation_without_a_mask_is_named(draw_ellipses) -> None:
    folder = draw_ellipses()
    content = folder.content()
    content["annotations"][3]["segmentation"] = []
    mixed = folder.annotations.with_name("mixed.json")
    mixed.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"mixed\.json: annotation 4 has no mask"):
        evaluate(Oracle(folder), folder.images, mixed, LABELS)


def test_annotations_of_other_categories_are_an_input_error(draw_ellipses) -> None:
    folder = draw_ellipses()
    with pytest.raises(InputError, match="none of its categories"):
        evaluate(Oracle(folder), folder.images, folder.annotations, ("green",))


def test_the_operating_point_counts_what_the_threshold_keeps(draw_ellipses) -> None:
    folder = draw_ellipses()
    scores = evaluate(
        Oracle(folder), folder.images, folder.annotations, LABELS, threshold=0.85
    )  # of the two instances of an image, one scores 0.9 and one 0.8
    assert scores["at_threshold"] == {
        "threshold": 0.85,
        "precision": 1,
        "recall": 0.5,
        "false_per_image": 0,
    }


def test_without_annotations_only_false_alarms_are_measured(draw_ellipses) -> None:
    folder = draw_ellipses()
    oracle = Oracle(folder)
    empty = folder.annotations.with_name("empty.json")
    empty.write_text(json.dumps({**folder.content(), "annotations": []}))
    scores = evaluate(oracle, folder.images, empty, LABELS, threshold=0.5)
    assert scores["at_threshold"] == {
        "threshold": 0.5,
        "precision": 0,
        "recall": None,
        "false_per_image": 2,
    }
    assert set(scores["bbox"].values()) == set(scores["segm"].values()) == {-1}


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_torch_network_predicts_in_pixels_of_the_image(with_masks: bool) -> None:
    config = network_config("lite0-fpn", ("a", "b"), with_masks)
    network = build_network(config).eval()
    network.roi_heads.score_thresh = 0.0
    network.transform.min_size, network.transform.max_size = (96,), 96
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    prediction = torch_predictor(network)(rgb)
    assert len(prediction.boxes) == len(prediction.scores) == len(prediction.labels) > 0
    assert prediction.boxes[:, 2].max() <= 60
    assert prediction.boxes[:, 3].max() <= 40
    if with_masks:
        assert prediction.masks is not None
        assert prediction.masks[0]["size"] == [40, 60]
    else:
        assert prediction.masks is None


@pytest.fixture
def posed(draw_ellipses):
    """Draw red ellipses with a person's keypoints, which are unknown in every second one."""
    folder = draw_ellipses()
    content = json.loads(folder.keypoints.read_text())
    content["categories"][0] |= {"keypoints": list(COCO_PERSON.names), "skeleton": []}
    rng = np.random.default_rng(0)
    for number, annotation in enumerate(content["annotations"]):
        x, y, width, height = annotation["bbox"]
        points = np.zeros((17, 3))
        points[:, :2] = [x, y] + rng.random((17, 2)) * [width, height]
        points[:, 2] = 0 if number % 2 else 2
        annotation["keypoints"] = points.ravel().tolist()
    folder.keypoints.write_text(json.dumps(content))
    return folder


class Poser:
    """Predicts the keypoints of a file, shifted by a number of pixels."""

    def __init__(self, folder, shift: float = 0) -> None:
        content = json.loads(folder.keypoints.read_text())
        self.annotations, self.shift = iter(content["annotations"]), shift

    def __call__(self, image) -> Prediction:
        annotation = next(self.annotations)
        x, y, width, height = annotation["bbox"]
        points = np.array([annotation["keypoints"]], np.float32).reshape(1, 17, 3)
        points[..., 0] += self.shift
        if not points[..., 2].any():  # no keypoint is known
            points[..., :2] = x, y
        return Prediction(
            np.float32([[x, y, x + width, y + height]]), np.float32([0.9]), np.ones(1), None, points
        )


def test_the_true_keypoints_score_one_and_unknown_ones_do_not_count(posed) -> None:
    scores = evaluate(
        Poser(posed),
        posed.images,
        posed.keypoints,
        ("red",),
        with_masks=False,
        keypoints=COCO_PERSON,
    )
    assert set(scores["keypoints"]) == {"AP", "AP50", "AP75", "APm", "APl"}
    assert scores["keypoints"]["AP"] == pytest.approx(1)
    assert scores["bbox"]["AP"] == pytest.approx(1)


def test_moved_keypoints_lose_keypoint_ap_alone(posed) -> None:
    scores = evaluate(
        Poser(posed, shift=6),
        posed.images,
        posed.keypoints,
        ("red",),
        with_masks=False,
        keypoints=COCO_PERSON,
    )
    assert scores["keypoints"]["AP"] < 0.3
    assert scores["bbox"]["AP"] == pytest.approx(1)


def test_keypoints_are_scored_only_if_both_sides_have_those_of_a_person(posed) -> None:
    others = Keypoints(("a",))
    for annotations, keypoints in (
        (posed.keypoints, None),
        (posed.keypoints, others),
        (posed.annotations, COCO_PERSON),
    ):
        predict = Poser(posed)
        scores = evaluate(
            predict,
            posed.images,
            annotations,
            ("red",),
            with_masks=False,
            keypoints=keypoints,
        )
        assert "keypoints" not in scores


def test_annotations_without_any_known_keypoint_have_no_score(posed) -> None:
    content = json.loads(posed.keypoints.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"] = [0] * 51
    posed.keypoints.write_text(json.dumps(content))
    scores = evaluate(
        Poser(posed),
        posed.images,
        posed.keypoints,
        ("red",),
        with_masks=False,
        keypoints=COCO_PERSON,
    )
    assert set(scores["keypoints"].values()) == {-1}


def test_a_torch_network_predicts_keypoints_in_pixels_of_the_image() -> None:
    config = network_config("lite0-fpn", ("a",), with_masks=False, keypoints=COCO_PERSON)
    network = build_network(config).eval()
    network.roi_heads.score_thresh = 0.0
    network.transform.min_size, network.transform.max_size = (96,), 96
    prediction = torch_predictor(network)(np.zeros((40, 60, 3), np.uint8))
    assert prediction.keypoints is not None
    assert prediction.keypoints.shape == (len(prediction.boxes), 17, 3)
    x, y = prediction.keypoints[..., 0], prediction.keypoints[..., 1]
    assert (x >= prediction.boxes[:, None, 0] - 0.1).all()
    assert (x <= prediction.boxes[:, None, 2] + 0.1).all()
    assert y.max() <= 40
