import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from maskcast.builder.evaluation.coco import (
    check_size,
    encode_mask,
    keypoints_of,
    read_annotations,
    read_keypoints,
)
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import Keypoints

HEIGHT, WIDTH = 16, 20
FILE = Path("a.json")


def encode(segmentation):
    return encode_mask({"id": 7, "segmentation": segmentation}, HEIGHT, WIDTH, FILE)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "is not an object"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [{"id": 1}]}', "an entry of 'images' has no 'file_name'"),
        ('{"images": [7]}', "an entry of 'images' has no 'file_name'"),
        ('{"images": [{"id": [], "file_name": "", "height": 1, "width": 1}]}', r"has \[\] as 'id'"),
    ],
)
def test_a_damaged_file_is_an_input_error_of_one_line(tmp_path: Path, text, complaint) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_annotations(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("bbox", [1, 2, 3], "annotation 7: its bbox"),
        ("bbox", [1, 2, -3, 4], "annotation 7: its bbox"),
        ("bbox", [1, 2, 3, 10**400], "annotation 7: its bbox"),
        ("bbox", [1, 2, 3, float("nan")], "annotation 7: its bbox"),
        ("bbox", "text", "annotation 7: its bbox"),
        ("image_id", None, "has None as 'image_id'"),
    ],
)
def test_an_annotation_with_wrong_values_is_named(tmp_path: Path, key, value, complaint) -> None:
    annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], key: value}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [], "categories": [], "annotations": [annotation]}))
    with pytest.raises(InputError, match=complaint):
        read_annotations(path)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 200_000), ("5", 5), (5.5, 5)])
def test_an_image_of_an_impossible_size_is_named(tmp_path: Path, height, width) -> None:
    path = tmp_path / "a.json"
    image = {"id": 3, "file_name": "x.png", "height": height, "width": width}
    path.write_text(json.dumps({"images": [image], "categories": [], "annotations": []}))
    with pytest.raises(InputError, match="image 3: invalid file_name"):
        read_annotations(path)


def test_an_image_must_have_the_size_that_the_file_says() -> None:
    entry = {"file_name": "x.png", "height": HEIGHT, "width": WIDTH}
    check_size(np.zeros((HEIGHT, WIDTH, 3), np.uint8), entry, FILE)
    with pytest.raises(
        InputError, match=r"x\.png: 16x20 pixels when upright, but a\.json says 20x16"
    ):
        check_size(np.zeros((WIDTH, HEIGHT, 3), np.uint8), entry, FILE)


def test_polygons_and_both_forms_of_rle_encode_the_same_mask() -> None:
    compressed = encode([[2.0, 2.0, 12.0, 2.0, 12.0, 9.0, 2.0, 9.0]])
    mask = coco_mask.decode(compressed)
    assert mask.sum() == 70
    columns = mask.T.ravel()
    edges = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff(np.concatenate([[0], edges, [columns.size]])).tolist()
    text = {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}
    for form in ({"size": [HEIGHT, WIDTH], "counts": counts}, text):
        assert np.array_equal(coco_mask.decode(encode(form)), mask)


def test_several_polygons_are_united_and_clipped_to_the_image() -> None:
    mask = coco_mask.decode(
        encode([[-5, -5, 3, -5, 3, 3, -5, 3], [15, 10, 30, 10, 30, 20, 15, 20]])
    )
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:3, :3] = 1
    expected[10:, 15:] = 1
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "far outside"),
        ([[0, 0, -1e9, 0, 5, 5]], "far outside"),
        ([[0, 0, 5, 0, 5, float("nan")]], "not a list of numbers"),
        ([[0, 0, 5, 0, 5, float("inf")]], "not a list of numbers"),
        ([[0, 0, 5, 0, 5, 10**400]], "not a list of numbers"),
        ([[0, 0, 5, 0, 5, "5"]], "not a list of numbers"),
        ([["text"]], "not a list of numbers"),
        ([3], "not a list of numbers"),
        ([[0, 0, 5, 5]], "three points"),
        ([[0, 0, 5, 5, 5, 0, 1]], "three points"),
        ([[]], "three points"),
        ([[0, 0, 19, 15] * 1000], "longer outline"),
        ("text", "neither polygons nor RLE"),
        ({"counts": [320]}, "of size None"),
        ({"size": [200_000, 200_000], "counts": [4 * 10**10]}, r"of size \[200000, 200000\]"),
        ({"size": [20, 16], "counts": [320]}, "of size"),
        ({"size": [16, 20]}, "no counts"),
        ({"size": [16, 20], "counts": []}, "covers 0 of 320"),
        ({"size": [16, 20], "counts": [100, 100]}, "covers 200 of 320"),
        ({"size": [16, 20], "counts": [-100, 420]}, "an invalid run"),
        ({"size": [16, 20], "counts": [10**30]}, "an invalid run"),
        ({"size": [16, 20], "counts": ["x"]}, "an invalid run"),
        ({"size": [16, 20], "counts": ""}, "damaged"),
        ({"size": [16, 20], "counts": "ooooooooooooooooooo"}, "damaged"),
        ({"size": [16, 20], "counts": "\U0001f600"}, "damaged"),
    ],
)  # fmt: skip
def test_an_invalid_mask_is_refused_with_the_id_of_its_annotation(segmentation, complaint) -> None:
    with pytest.raises(InputError, match=rf"^a\.json: annotation 7: .*{complaint}"):
        encode(segmentation)


POSED = {"id": 1, "name": "person", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}


def test_keypoints_of_a_category_count_from_zero() -> None:
    found = read_keypoints({"categories": [{"id": 2, "name": "car"}, POSED]}, FILE)
    assert found == Keypoints(("nose", "tail"), ((0, 1),))
    assert read_keypoints({"categories": [{"id": 2, "name": "car", "keypoints": []}]}, FILE) is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"skeleton": [[1, 3]]}, "an index that is not below"),
        ({"skeleton": [[0, 1]]}, ">= 0"),
        ({"skeleton": [[1]]}, "length 2"),
        ({"skeleton": 5}, "not iterable"),
        ({"keypoints": "nose"}, "Expected `array`"),
        ({"keypoints": ["nose", "nose"]}, "same name"),
    ],
)
def test_keypoints_that_are_not_cocos_are_an_input_error(changes, complaint: str) -> None:
    with pytest.raises(
        InputError, match=rf"^a\.json: .*not in COCO's form .*{complaint}"
    ) as caught:
        read_keypoints({"categories": [{**POSED, **changes}]}, FILE)
    assert "\n" not in str(caught.value)


def test_keypoints_of_several_categories_are_refused() -> None:
    with pytest.raises(InputError, match=r"several categories have keypoints \(person, dog\)"):
        read_keypoints({"categories": [POSED, {**POSED, "name": "dog"}]}, FILE)


def test_all_keypoints_of_an_annotation_without_any_are_unknown() -> None:
    assert not keypoints_of({"id": 7}, 2, FILE).any()
    points = keypoints_of({"id": 7, "keypoints": [1.5, 2, 2, 0, 0, 0]}, 2, FILE)
    assert points.tolist() == [[1.5, 2, 2], [0, 0, 0]]
    assert points.dtype == np.float32


@pytest.mark.parametrize(
    "values",
    [[1, 2, 2], [1, 2, 3, 0, 0, 0], [1, 2, 2, 0, 0, "0"], [1, float("nan"), 2, 0, 0, 0], "text", 7],
)
def test_invalid_points_are_refused_with_the_id_of_their_annotation(values) -> None:
    with pytest.raises(InputError, match=r"^a\.json: annotation 7: its keypoints are not 2 times"):
        keypoints_of({"id": 7, "keypoints": values}, 2, FILE)
