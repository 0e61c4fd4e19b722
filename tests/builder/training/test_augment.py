import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.builder.training import augment
from maskcast.builder.training.augment import Example


def example(width: int = 60, height: int = 40, with_masks: bool = True) -> Example:
    image = np.zeros((height, width, 3), np.uint8)
    masks = np.zeros((2, height, width), np.uint8)
    masks[0, 5:25, 10:30] = 1
    masks[1, 20:36, 35:55] = 1
    image[masks[0] == 1] = (250, 0, 0)
    image[masks[1] == 1] = (0, 0, 250)
    boxes = augment.boxes_of_masks(masks)
    labels = np.array([1, 2], np.int64)
    return Example(image, boxes, labels, masks if with_masks else None)


def test_boxes_of_masks_are_tight_and_half_open() -> None:
    assert example().boxes.tolist() == [[10, 5, 30, 25], [35, 20, 55, 36]]


def test_the_box_of_an_empty_mask_is_zeros() -> None:
    assert augment.boxes_of_masks(np.zeros((1, 5, 5), np.uint8)).tolist() == [[0, 0, 0, 0]]


def test_flipping_twice_gives_the_example_back() -> None:
    before, after = example(), augment.flip(augment.flip(example()))
    assert np.array_equal(after.image, before.image)
    assert np.array_equal(after.boxes, before.boxes)
    assert np.array_equal(after.masks, before.masks)


def test_a_flipped_box_still_fits_its_flipped_mask() -> None:
    flipped = augment.flip(example())
    assert flipped.masks is not None
    assert np.array_equal(flipped.boxes, augment.boxes_of_masks(flipped.masks))


def test_doubling_the_size_doubles_boxes_and_masks() -> None:
    doubled = augment.resize(example(), 120, 80)
    assert doubled.image.shape == (80, 120, 3)
    assert doubled.masks is not None
    assert np.array_equal(doubled.boxes, example().boxes * 2)
    assert np.array_equal(augment.boxes_of_masks(doubled.masks), doubled.boxes)


def test_a_crop_fits_boxes_to_what_is_left_of_the_masks() -> None:
    cropped = augment.crop(example(), left=20, top=0, size=32)
    assert cropped.boxes.tolist() == [[0, 5, 10, 25], [15, 20, 32, 32]]
    assert cropped.labels.tolist() == [1, 2]


def test_a_crop_clips_boxes_that_have_no_masks() -> None:
    cropped = augment.crop(example(with_masks=False), left=20, top=0, size=32)
    assert cropped.boxes.tolist() == [[0, 5, 10, 25], [15, 20, 32, 32]]
    assert cropped.masks is None


def test_a_crop_keeps_the_box_of_an_instance_that_has_no_mask_among_others_that_do() -> None:
    mixed = example()
    assert mixed.masks is not None
    mixed.masks[1] = 0
    cropped = augment.crop(mixed, 0, 0, 64)
    assert cropped.boxes.tolist() == mixed.boxes.tolist()
    assert cropped.masks is not None
    assert cropped.masks.any(axis=(1, 2)).tolist() == [True, False]


def test_instances_outside_a_crop_are_dropped_with_their_labels_and_masks() -> None:
    cropped = augment.crop(example(), left=32, top=0, size=28)
    assert cropped.labels.tolist() == [2]
    assert cropped.masks is not None
    assert cropped.masks.shape == (1, 28, 28)


def test_a_crop_beyond_the_image_is_filled_with_grey() -> None:
    cropped = augment.crop(example(), left=0, top=0, size=64)
    assert (cropped.image[40:] == 127).all()
    assert (cropped.image[:, 60:] == 127).all()
    assert np.array_equal(cropped.image[:40, :60], example().image)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 90), st.integers(20, 90), st.booleans())
def test_a_random_canvas_has_its_size_and_keeps_boxes_inside(
    seed: int, width: int, height: int, with_masks: bool
) -> None:
    source = augment.resize(example(with_masks=with_masks), width, height)
    result = augment.random_canvas(source, 48, (0.7, 1.7), np.random.default_rng(seed))
    assert result.image.shape == (48, 48, 3)
    assert len(result.boxes) == len(result.labels)
    assert (result.boxes >= 0).all()
    assert (result.boxes <= 48).all()
    assert (result.boxes[:, 2:] - result.boxes[:, :2] >= 4).all()
    if result.masks is not None:
        assert np.array_equal(result.boxes, augment.boxes_of_masks(result.masks))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 300), st.integers(10, 300))
def test_a_random_shorter_side_lies_in_its_range_unless_the_longer_is_at_its_limit(
    seed: int, width: int, height: int
) -> None:
    source = Example(
        np.zeros((height, width, 3), np.uint8),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros((0, height, width), np.uint8),
    )
    result = augment.random_shorter_side(source, (64, 80), 133, np.random.default_rng(seed))
    shorter, longer = sorted(result.image.shape[:2])
    assert longer <= 133
    assert shorter <= 80
    assert shorter >= 64 or longer == 133


def test_colour_jitter_of_strength_zero_changes_no_pixel_by_more_than_rounding() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    same = augment.jitter_colour(image, np.random.default_rng(1), 0.0)
    assert np.abs(same.astype(int) - image).max() <= 1


def test_the_same_generator_state_gives_the_same_augmentation() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    first = augment.jitter_colour(image, np.random.default_rng(5))
    assert np.array_equal(first, augment.jitter_colour(image, np.random.default_rng(5)))
    assert not np.array_equal(first, augment.jitter_colour(image, np.random.default_rng(6)))


def person(left: int, top: int, right: int, bottom: int) -> Example:
    """Draw an image of 60 x 40 pixels with one white instance."""
    masks = np.zeros((1, 40, 60), np.uint8)
    masks[0, top:bottom, left:right] = 1
    image = np.zeros((40, 60, 3), np.uint8)
    image[masks[0] == 1] = 255
    return Example(image, augment.boxes_of_masks(masks), np.array([3], np.int64), masks)


ONE = np.array([True])


def test_a_pasted_instance_covers_the_pixels_and_masks_behind_it() -> None:
    pasted = augment.paste(example(), person(20, 0, 40, 40), ONE)
    assert pasted.masks is not None
    assert pasted.labels.tolist() == [1, 2, 3]
    assert (pasted.image[pasted.masks[2] == 1] == 255).all()
    assert not (pasted.masks[:2] & pasted.masks[2]).any()
    # The first reached from x = 10 to 30, the second from 35 to 55.
    assert pasted.boxes.tolist() == [[10, 5, 20, 25], [40, 20, 55, 36], [20, 0, 40, 40]]


def test_an_almost_covered_instance_is_dropped() -> None:
    pasted = augment.paste(example(), person(10, 6, 60, 40), ONE)
    assert pasted.labels.tolist() == [3]


def test_only_the_chosen_instances_are_pasted() -> None:
    pasted = augment.paste(person(0, 0, 5, 5), example(), np.array([False, True]))
    assert pasted.labels.tolist() == [3, 2]
    assert (pasted.image[10, 15] == 0).all()


def test_boxes_without_masks_stay_as_they_are_and_get_empty_masks() -> None:
    pasted = augment.paste(example(with_masks=False), person(28, 0, 40, 40), ONE)
    assert pasted.masks is not None
    assert pasted.boxes.tolist() == [*example().boxes.tolist(), [28, 0, 40, 40]]
    assert pasted.masks.any(axis=(1, 2)).tolist() == [False, False, True]


def test_pasting_keeps_the_box_of_an_instance_without_a_mask_and_cuts_the_mask_of_another() -> None:
    mixed = example()
    assert mixed.masks is not None
    mixed.masks[1] = 0
    pasted = augment.paste(mixed, person(20, 0, 40, 40), ONE)
    assert pasted.boxes.tolist() == [
        [10, 5, 20, 25],
        example().boxes[1].tolist(),
        [20, 0, 40, 40],
    ]


def test_a_box_without_a_mask_that_is_mostly_covered_is_dropped() -> None:
    pasted = augment.paste(example(with_masks=False), person(8, 0, 28, 40), ONE)
    assert pasted.labels.tolist() == [2, 3]


def posed(points: list[list[float]]) -> Example:
    """Return the example with these keypoints in its first instance and none in its second."""
    known = np.array([points, [[0, 0, 0]] * len(points)], np.float32)
    return example()._replace(keypoints=known)


def test_keypoints_scale_with_the_image() -> None:
    doubled = augment.resize(posed([[10, 8, 2]]), 120, 60)
    assert doubled.keypoints is not None
    assert doubled.keypoints[0].tolist() == [[20, 12, 2]]


def test_a_mirror_moves_keypoints_and_swaps_left_and_right() -> None:
    before = posed([[10, 8, 2], [25, 9, 1]])
    flipped = augment.flip(before, mirrored=(1, 0))
    assert flipped.keypoints is not None
    assert flipped.keypoints[0].tolist() == [[35, 9, 1], [50, 8, 2]]
    assert np.array_equal(flipped.keypoints[1, :, 2], [0, 0])
    back = augment.flip(flipped, mirrored=(1, 0))
    assert back.keypoints is not None
    assert np.array_equal(back.keypoints[0], before.keypoints[0])


def test_keypoints_outside_a_crop_become_unknown() -> None:
    cropped = augment.crop(posed([[25, 8, 2], [11, 8, 2], [25, 24, 1]]), left=20, top=0, size=20)
    assert cropped.keypoints is not None
    assert cropped.keypoints[0, :, 2].tolist() == [2, 0, 0]
    assert cropped.keypoints[0, 0].tolist() == [5, 8, 2]


def test_the_keypoints_of_a_dropped_instance_are_dropped() -> None:
    cropped = augment.crop(posed([[25, 8, 2]]), left=32, top=0, size=28)
    assert cropped.keypoints is not None
    assert cropped.keypoints.shape == (1, 1, 3)
    assert cropped.keypoints[0, 0, 2] == 0


def test_covered_keypoints_become_unknown() -> None:
    above = person(10, 0, 20, 20)._replace(keypoints=np.float32([[[15, 4, 2], [0, 0, 0]]]))
    pasted = augment.paste(posed([[15, 8, 2], [25, 8, 2]]), above, ONE)
    assert pasted.keypoints is not None
    assert pasted.keypoints[:, :, 2].tolist() == [[0, 2], [0, 0], [2, 0]]
    assert pasted.keypoints[2, 0].tolist() == [15, 4, 2]
