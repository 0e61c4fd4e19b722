import pytest

from maskcast.builder.evaluation.operating_point import measure_operating_point


def instance(x, *, image=1, category=1, crowd=0, width=10):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, 0, width, 10],
        "iscrowd": crowd,
    }


def detection(x, score, *, image=1, category=1):
    return {"image_id": image, "category_id": category, "bbox": [x, 0, 10, 10], "score": score}


def test_true_and_false_positives_and_misses_are_counted_over_all_images():
    annotations = [instance(0), instance(50), instance(0, image=2)]
    results = [
        detection(1, 0.9),  # IoU 9/11 with the first
        detection(80, 0.8),  # nothing there
        detection(0, 0.7, image=2),
        detection(0, 0.7, image=3),  # an image without annotations
        detection(50, 0.4),  # below the threshold
    ]
    point = measure_operating_point(annotations, results, 4, 0.5)
    assert point == {
        "threshold": 0.5,
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "false_per_image": pytest.approx(2 / 4),
    }


def test_a_score_equal_to_the_threshold_counts():
    assert measure_operating_point([instance(0)], [detection(0, 0.5)], 1, 0.5)["recall"] == 1


@pytest.mark.parametrize(("shift", "is_right"), [(10 / 3 - 0.01, True), (10 / 3 + 0.01, False)])
def test_boxes_match_from_an_iou_of_one_half(shift, is_right):
    # Two boxes 10 wide, shifted by 10/3, share 20/3 of 40/3.
    point = measure_operating_point([instance(0)], [detection(shift, 0.9)], 1, 0.5)
    assert point["precision"] == is_right


def test_a_second_detection_of_an_instance_is_a_false_positive():
    point = measure_operating_point([instance(0)], [detection(0, 0.6), detection(1, 0.9)], 1, 0.5)
    assert (point["precision"], point["recall"], point["false_per_image"]) == (0.5, 1, 1)


def test_the_highest_score_chooses_first_and_takes_the_largest_overlap():
    # The first detection overlaps both instances by more than half and belongs to the second; if
    # it took the first, the other detection would be left without one.
    annotations = [instance(0), instance(3)]
    point = measure_operating_point(annotations, [detection(-2, 0.6), detection(2, 0.9)], 1, 0.5)
    assert (point["precision"], point["recall"]) == (1, 1)


def test_the_second_best_instance_is_taken_where_the_best_is_matched():
    annotations = [instance(0), instance(3)]
    point = measure_operating_point(annotations, [detection(0, 0.9), detection(1, 0.8)], 1, 0.5)
    assert (point["precision"], point["recall"]) == (1, 1)


def test_detections_in_a_crowd_and_missed_crowds_are_not_counted():
    annotations = [instance(0, crowd=1, width=40), instance(20)]
    on_the_crowd, half_outside = detection(5, 0.9), detection(36, 0.9)
    point = measure_operating_point(
        annotations, [on_the_crowd, detection(20, 0.8), half_outside], 1, 0.5
    )
    assert point == {"threshold": 0.5, "precision": 0.5, "recall": 1, "false_per_image": 1}


def test_another_category_does_not_match():
    point = measure_operating_point([instance(0)], [detection(0, 0.9, category=2)], 1, 0.5)
    assert (point["precision"], point["recall"], point["false_per_image"]) == (0, 0, 1)


def test_what_cannot_be_measured_is_none():
    point = measure_operating_point([], [], 3, 0.8)
    assert point == {"threshold": 0.8, "precision": None, "recall": None, "false_per_image": 0}
    assert measure_operating_point([], [detection(0, 0.9)], 2, 0.8)["false_per_image"] == 0.5


def test_an_empty_box_is_a_false_positive_without_a_division_by_zero():
    empty = {"image_id": 1, "category_id": 1, "bbox": [3, 3, 0, 0], "score": 0.9}
    point = measure_operating_point([instance(0, crowd=1)], [empty], 1, 0.5)
    assert point["false_per_image"] == 1
