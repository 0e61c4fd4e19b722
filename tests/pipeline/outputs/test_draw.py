from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.outputs.draw import (
    Annotator,
    Rectangle,
    _font,
    _overlap,
    limb_colour,
    limb_width,
    palette,
    place_tag,
)

NAMES = ("background", "person", "dog")


def instances(*boxes: tuple[float, float, float, float], size: tuple[int, int]) -> Instances:
    count = len(boxes)
    return Instances(
        width=size[0],
        height=size[1],
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.6, count).astype(np.float32),
        labels=np.ones(count, np.int32),
        masks=np.full((count, 28, 28), 255, np.uint8),
    )


def drawn(found: Instances, painter: Annotator | None = None, grey: int = 128) -> NDArray[np.uint8]:
    image = Image.new("RGB", (found.width, found.height), (grey, grey, grey))
    (painter or Annotator(NAMES)).draw(image, found)
    return np.asarray(image)


def test_nothing_is_drawn_where_nothing_was_seen() -> None:
    assert (drawn(instances(size=(64, 48))) == 128).all()


def test_a_mask_is_translucent_and_the_rest_of_the_image_stays() -> None:
    image = drawn(instances((200, 150, 400, 350), size=(640, 480)))
    colour = np.array(palette(0))
    inside = image[250, 300].astype(int)
    np.testing.assert_allclose(inside, 128 + (colour - 128) * 0.42, atol=2)
    assert (image[360:, :] == 128).all()
    assert (image[:, 410:] == 128).all()
    assert (image[:, :190] == 128).all()


def test_a_mask_is_outlined_in_its_full_colour() -> None:
    found = instances((200, 150, 400, 350), size=(640, 480))
    cells = np.zeros((1, 28, 28), np.uint8)
    cells[:, 8:20, 8:20] = 255
    found = Instances(640, 480, found.boxes, found.scores, found.labels, cells)
    mask = found.mask(0)
    edge = mask & ~np.roll(mask, 1, axis=1)
    assert (drawn(found)[edge] == palette(0)).all()


def test_instances_of_one_image_differ_in_colour() -> None:
    numbers = [palette(n) for n in range(24)]
    distances = [
        np.abs(np.subtract(a, b)).sum() for i, a in enumerate(numbers) for b in numbers[:i]
    ]
    assert min(distances) > 25
    neighbours = [np.abs(np.subtract(numbers[n], numbers[n + 1])).sum() for n in range(23)]
    assert min(neighbours) > 200


def test_an_instance_keeps_its_colour_when_the_order_changes() -> None:
    painter = Annotator(NAMES)
    left, right = (50, 100, 150, 300), (400, 100, 500, 300)
    first = drawn(instances(left, right, size=(640, 480)), painter)
    moved_right, moved_left = (410, 105, 510, 305), (60, 95, 160, 295)
    second = drawn(instances(moved_right, moved_left, size=(640, 480)), painter)
    assert (first[200, 100] == second[200, 110]).all()
    assert (first[200, 450] == second[200, 460]).all()
    assert (first[200, 100] != first[200, 450]).any()


def test_a_new_instance_takes_a_colour_that_no_other_has() -> None:
    painter = Annotator(NAMES)
    drawn(instances((50, 100, 150, 300), size=(640, 480)), painter)
    both = drawn(instances((400, 100, 500, 300), (50, 100, 150, 300), size=(640, 480)), painter)
    assert (both[200, 450] != both[200, 100]).any()


def test_boxes_without_masks_are_drawn() -> None:
    found = instances((200, 150, 400, 350), size=(640, 480))
    found = Instances(640, 480, found.boxes, found.scores, found.labels, None)
    image = drawn(found)
    assert (image[250, 200] == palette(0)).all()
    assert (image[250, 300] == 128).all()


def test_tiny_images_and_boxes_at_the_edge_are_drawn() -> None:
    assert drawn(instances((0, 0, 1, 1), size=(1, 1))).shape == (1, 1, 3)
    assert drawn(instances((0, 0, 64, 48), (63, 47, 64, 48), size=(64, 48))).shape == (48, 64, 3)


def test_the_label_is_above_its_box_or_inside_if_there_is_no_space() -> None:
    colour = palette(0)
    above = drawn(instances((200, 150, 400, 350), size=(640, 480)))
    assert (above[146, 201] == colour).all()
    inside = drawn(instances((200, 2, 400, 350), size=(640, 480)))
    assert (inside[5, 202] == colour).all()


def test_a_track_keeps_its_colour_at_any_place_and_in_any_order() -> None:
    found = instances((100, 200, 200, 300), (400, 200, 500, 300), size=(640, 480))
    painter = Annotator(NAMES)
    first = drawn(replace(found, track_ids=np.array([12, 5], np.int32)), painter)
    other = drawn(replace(found, track_ids=np.array([5, 12], np.int32)), painter)
    assert tuple(first[202, 100]) == tuple(other[202, 400]) == palette(12)
    assert tuple(first[202, 400]) == tuple(other[202, 100]) == palette(5)


def test_a_track_is_named() -> None:
    found = instances((100, 200, 200, 300), size=(640, 480))
    named = drawn(replace(found, track_ids=np.array([12], np.int32)))
    unnamed = drawn(replace(found, track_ids=np.array([0], np.int32)))
    assert (named[170:199] != unnamed[170:199]).any()


def test_tags_of_neighbours_do_not_overlap() -> None:
    boxes = np.array([[20, 60, 80, 200], [24, 62, 84, 200], [28, 64, 88, 200]], np.float32)
    placed: list[Rectangle] = []
    for box in boxes:
        placed.append(place_tag((320, 240), box, "person 98%", _font(12), placed))
    for place, tag in enumerate(placed):
        assert not any(_overlap(tag, other) for other in placed[:place])
        assert tag[1] >= 0
        assert tag[3] <= 240
    assert placed[0][3] == pytest.approx(60)  # the best one is on top of its box


LIMBS = Keypoints(("head", "hip", "foot"), ((0, 1), (1, 2)))


def posed(found: Instances, *poses: list[tuple[float, float, float]]) -> Instances:
    return replace(found, keypoints=np.array(poses, np.float32))


def test_a_skeleton_is_drawn_in_a_colour_for_each_limb_with_white_joints() -> None:
    found = instances((100, 100, 300, 400), size=(640, 480))
    pose = posed(found, [(200, 120, 0.9), (200, 250, 0.9), (200, 390, 0.9)])
    image = drawn(pose, Annotator(NAMES, LIMBS))
    assert tuple(image[180, 200]) == limb_colour(0, 2)
    assert tuple(image[320, 200]) == limb_colour(1, 2)
    assert limb_colour(0, 2) != limb_colour(1, 2)
    for y in (120, 250, 390):
        assert (image[y, 200] == 255).all()
    for side in (image[180, 195:200], image[180, 201:206]):
        assert (side < 40).all(axis=1).any(), "a dark edge sets it off"


def test_keypoints_that_the_model_does_not_see_and_their_limbs_are_left_out() -> None:
    found = instances((100, 100, 300, 400), size=(640, 480))
    pose = posed(found, [(200, 120, 0.9), (200, 250, 0.9), (200, 390, 0.29)])
    image = drawn(pose, Annotator(NAMES, LIMBS))
    plain = drawn(found)
    assert (image[270:] == plain[270:]).all()
    assert (image[180, 200] != plain[180, 200]).any()


def test_limbs_of_small_people_are_thin() -> None:
    assert limb_width(np.float32([0, 0, 20, 40]), 2) == 1
    assert limb_width(np.float32([0, 0, 100, 200]), 2) == 4
    assert limb_width(np.float32([0, 0, 500, 900]), 2) == 6
    assert limb_width(np.float32([5, 5, 5, 5]), 2) == 1


def test_without_the_models_keypoints_or_without_a_pose_there_is_no_skeleton() -> None:
    found = instances((100, 100, 300, 400), size=(640, 480))
    pose = posed(found, [(200, 120, 0.9)] * 3)
    assert (drawn(pose) == drawn(found)).all()
    assert (drawn(found, Annotator(NAMES, LIMBS)) == drawn(found)).all()


def test_a_pose_at_the_edge_and_one_without_lines_are_drawn() -> None:
    found = instances((0, 0, 64, 48), size=(64, 48))
    pose = posed(found, [(0, 0, 1), (64, 48, 1), (64, 0, 1)])
    assert (drawn(pose, Annotator(NAMES, LIMBS)) != drawn(found)).any()
    points = Keypoints(LIMBS.names)
    assert (drawn(pose, Annotator(NAMES, points)) != drawn(found)).any()
