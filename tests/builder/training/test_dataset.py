import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from maskcast.builder.training.dataset import (
    AugmentedDataset,
    EpochSampler,
    InstanceDataset,
    open_keypoints,
)
from maskcast.builder.training.recipe import Recipe
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import Keypoints

RECIPE = Recipe(canvas=64, colour_jitter=0.2)


def test_an_example_has_the_image_and_masks_that_cover_the_coloured_pixels(draw_ellipses) -> None:
    folder = draw_ellipses()
    example = InstanceDataset(folder.images, folder.annotations).read(0)
    assert example.image.shape == (96, 128, 3)
    assert example.masks is not None
    # Categories in the order of their ids: blue (3) is label 1, red (7) is label 2.
    assert example.labels.tolist() == [2, 1]
    for mask, label in zip(example.masks, example.labels, strict=True):
        channel = 0 if label == 2 else 2
        coloured = example.image[:, :, channel] > 200
        intersection = (coloured & (mask == 1)).sum()
        assert intersection / (coloured | (mask == 1)).sum() > 0.9


def test_labels_are_matched_by_name_and_other_categories_left_out(draw_ellipses) -> None:
    folder = draw_ellipses()
    dataset = InstanceDataset(folder.images, folder.annotations, labels=("green", "red"))
    assert dataset.read(0).labels.tolist() == [2]


def test_ids_may_be_numbers_and_strings_and_names_numbers(draw_ellipses) -> None:
    folder = draw_ellipses()
    content = json.loads(folder.annotations.read_text().replace('"blue"', "5"))
    content["categories"].append({"id": "x", "name": "green"})
    folder.write(content)
    dataset = InstanceDataset(folder.images, folder.annotations)
    assert dataset.labels == ("5", "red", "green")
    assert dataset.read(0).labels.tolist() == [2, 1]


def test_crowds_are_left_out_and_images_without_instances_kept(draw_ellipses) -> None:
    folder = draw_ellipses(count=2)
    content = folder.content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 100)
    folder.write(content)
    dataset = InstanceDataset(folder.images, folder.annotations)
    assert len(dataset) == 2
    empty = dataset.read(0)
    assert empty.boxes.shape == (0, 4)
    assert empty.masks is not None
    assert empty.masks.shape == (0, 96, 128)
    assert len(dataset.read(1).labels) == 2


def test_box_annotations_have_no_masks(draw_ellipses) -> None:
    folder = draw_ellipses()
    dataset = InstanceDataset(folder.images, folder.boxes, masks="none")
    example = dataset.read(0)
    assert example.masks is None
    with_masks = InstanceDataset(folder.images, folder.annotations).read(0)
    np.testing.assert_allclose(example.boxes, with_masks.boxes)


def test_masks_of_some_instances_are_read_and_those_of_the_others_are_empty(draw_ellipses) -> None:
    folder = draw_ellipses(count=1)
    content = folder.content()
    content["annotations"][1]["segmentation"] = []
    folder.write(content)
    example = InstanceDataset(folder.images, folder.annotations, masks="some").read(0)
    assert example.masks is not None
    assert example.masks.any(axis=(1, 2)).tolist() == [True, False]
    assert len(example.boxes) == 2


def test_only_instances_of_fully_annotated_images_are_pasted(draw_ellipses) -> None:
    folder = draw_ellipses(count=2)
    some = InstanceDataset(folder.images, folder.annotations, masks="some")
    recipe = msgspec.structs.replace(RECIPE, paste=1.0)
    alone = AugmentedDataset([some], recipe, seed=0)
    others = AugmentedDataset(
        [some, InstanceDataset(folder.images, folder.annotations)], recipe, seed=0
    )
    assert len(alone[0, 0][1]["boxes"]) == 2
    assert max(len(others[epoch, 0][1]["boxes"]) for epoch in range(5)) > 2


def test_annotations_without_masks_are_an_input_error_where_masks_are_needed(
    draw_ellipses,
) -> None:
    folder = draw_ellipses()
    with pytest.raises(InputError, match="has no mask"):
        InstanceDataset(folder.images, folder.boxes)


def test_missing_paths_are_input_errors(draw_ellipses, tmp_path: Path) -> None:
    folder = draw_ellipses()
    with pytest.raises(InputError, match="cannot read"):
        InstanceDataset(folder.images, tmp_path / "absent.json")
    with pytest.raises(InputError, match="no such folder"):
        InstanceDataset(tmp_path / "absent", folder.annotations)
    (folder.images / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="not an image"):
        InstanceDataset(folder.images, folder.annotations).read(1)
    (folder.images / "0.png").unlink()
    with pytest.raises(InputError, match="no such image"):
        InstanceDataset(folder.images, folder.annotations)


def test_an_item_is_a_function_of_seed_epoch_and_index(draw_ellipses) -> None:
    folder = draw_ellipses()
    dataset = InstanceDataset(folder.images, folder.annotations)
    first = AugmentedDataset([dataset], RECIPE, seed=1)
    again = AugmentedDataset([dataset], RECIPE, seed=1)
    assert first[0, 2][0].equal(again[0, 2][0])
    assert first[0, 2][1]["boxes"].equal(again[0, 2][1]["boxes"])
    assert not first[0, 2][0].equal(first[1, 2][0])
    assert not first[0, 2][0].equal(AugmentedDataset([dataset], RECIPE, seed=2)[0, 2][0])


def test_items_are_what_the_losses_take(draw_ellipses) -> None:
    folder = draw_ellipses()
    masked = InstanceDataset(folder.images, folder.annotations)
    boxed = InstanceDataset(folder.images, folder.boxes, masks="none")
    dataset = AugmentedDataset([masked, boxed], RECIPE, seed=0)
    assert len(dataset) == 8
    image, target = dataset[0, 0]
    assert image.shape == (3, 64, 64)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert target["masks"].shape == (len(target["boxes"]), 64, 64)
    assert "masks" not in dataset[0, 5][1]


def test_without_a_canvas_whole_images_are_resized(draw_ellipses) -> None:
    folder = draw_ellipses()
    recipe = msgspec.structs.replace(Recipe(), shorter_sides=(48, 48), longest=100)
    dataset = InstanceDataset(folder.images, folder.annotations)
    image, target = AugmentedDataset([dataset], recipe, seed=0)[0, 0]
    assert image.shape == (3, 48, 64)
    assert len(target["boxes"]) == 2


def test_an_epoch_shows_every_image_once_and_each_epoch_in_another_order() -> None:
    batches = list(EpochSampler(12, 4, seed=0, start=0, stop=6))
    first, second = batches[:3], batches[3:]
    assert sorted(i for batch in first for _, i in batch) == list(range(12))
    assert sorted(i for batch in second for _, i in batch) == list(range(12))
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]
    assert {epoch for batch in second for epoch, _ in batch} == {1}


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_sampler_that_starts_later_gives_the_same_batches(start: int) -> None:
    whole = list(EpochSampler(10, 3, seed=3, start=0, stop=7))
    assert list(EpochSampler(10, 3, seed=3, start=start, stop=7)) == whole[start:]


def test_keypoints_are_read_with_their_names_lines_and_masks(draw_ellipses) -> None:
    folder = draw_ellipses()
    dataset = InstanceDataset(folder.images, folder.keypoints, masks="some", with_keypoints=True)
    assert dataset.keypoints == Keypoints(
        ("left_end", "right_end", "bottom", "top"), ((0, 1), (2, 3))
    )
    example = dataset.read(0)
    assert example.keypoints is not None
    assert example.masks is not None
    left, right, bottom, top = example.keypoints[0]
    np.testing.assert_allclose([left[0], right[0]], example.boxes[0, [0, 2]], rtol=1e-6)
    assert [left[2], right[2], bottom[2], top[2]] == [2, 2, 1, 0]


def test_an_item_of_a_file_without_keypoints_has_unknown_ones(draw_ellipses) -> None:
    folder = draw_ellipses()
    boxed = InstanceDataset(folder.images, folder.boxes, labels=("red",), masks="none")
    posed = open_keypoints(folder.images, [folder.keypoints], ("red",), with_masks=True)
    dataset = AugmentedDataset([boxed, *posed], RECIPE, seed=0, keypoints=posed[0].keypoints)
    assert dataset[0, 0][1]["keypoints"].shape[1:] == (4, 3)
    assert not dataset[0, 0][1]["keypoints"].any()
    assert (dataset[0, 4][1]["keypoints"][..., 2] > 0).any()


def test_masks_of_a_file_with_keypoints_are_read_where_there_are(draw_ellipses) -> None:
    folder = draw_ellipses()
    content = json.loads(folder.keypoints.read_text())

    def kind(*, with_masks: bool = True) -> str:
        folder.keypoints.write_text(json.dumps(content))
        (data,) = open_keypoints(folder.images, [folder.keypoints], ("red",), with_masks=with_masks)
        return data.masks

    assert kind() == "all"
    assert kind(with_masks=False) == "none"
    content["annotations"][1]["segmentation"] = []
    assert kind() == "some"
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    assert kind() == "none"


def test_keypoint_files_that_cannot_be_learned_from_are_input_errors(draw_ellipses) -> None:
    folder = draw_ellipses()
    with pytest.raises(InputError, match=r"boxes\.json: none of its categories has keypoints"):
        open_keypoints(folder.images, [folder.boxes], ("red",), with_masks=False)
    with pytest.raises(InputError, match="a model of one class, not of 2: red, blue"):
        open_keypoints(folder.images, [folder.keypoints], ("red", "blue"), with_masks=False)
    content = json.loads(folder.keypoints.read_text())
    content["categories"][0]["keypoints"][0] = "tail"
    other = folder.keypoints.with_name("other.json")
    other.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"other\.json: its keypoints differ from those in .*keypoints\.json"
    ):
        open_keypoints(folder.images, [folder.keypoints, other], ("red",), with_masks=False)
