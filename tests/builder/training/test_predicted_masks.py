import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import PORTRAIT
from PIL import Image

from maskcast.builder.checkpoint.checkpoint import load_bundle_weights
from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.dataset import InstanceDataset
from maskcast.builder.training.predicted_masks import predict_masks
from maskcast.engines.bundle import open_bundle


class Person:
    """A photograph of a person, with the box and mask that the network finds in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network: Any = build_network(network_config("lite0-fpn", ("person",)))
        load_bundle_weights(self.network, open_bundle("default"))
        with Image.open(PORTRAIT) as photo:
            portrait = photo.convert("RGB").resize((256, 300))
        image = Image.new("RGB", (600, 600), (120, 120, 120))
        image.paste(portrait, (170, 200))
        image.save(folder / "0.png")
        self.width, self.height = image.size
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() / 255
        with torch.inference_mode():
            found = self.network.eval()([pixels])[0]
        left, top, right, bottom = found["boxes"][0].tolist()
        self.box = [left, top, right - left, bottom - top]
        self.mask = found["masks"][0, 0].numpy() > 0.5

    def predict(self, *annotations: dict[str, Any]) -> Path:
        """Predict masks for copies of the person's annotation with changed keys."""
        content = {
            "images": [
                {"id": 1, "file_name": "0.png", "width": self.width, "height": self.height},
                {"id": 2, "file_name": "no such image without boxes.png", "width": 9, "height": 9},
            ],
            "categories": [{"id": 9, "name": "person"}, {"id": 4, "name": "bicycle"}],
            "annotations": [
                {"id": n, "image_id": 1, "category_id": 9, "iscrowd": 0, "bbox": self.box, **keys}
                for n, keys in enumerate(annotations)
            ],
        }
        boxes, output = self.folder / "boxes.json", self.folder / "predicted.json"
        boxes.write_text(json.dumps(content))
        self.counts = predict_masks(self.network, self.folder, boxes, output, ("person",))
        return output

    def has_mask(self, **keys: Any) -> bool:
        """Return whether a copy of the person's annotation with changed keys gets a mask."""
        content = json.loads(self.predict(keys).read_text())
        return bool(content["annotations"][0]["segmentation"])


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Person:
    return Person(tmp_path_factory.mktemp("photos"))


def keypoints(*points: tuple[float, float, int]) -> list[float]:
    return [value for point in points for value in point]


def test_a_predicted_mask_covers_the_person_in_its_box(person: Person) -> None:
    content = json.loads(person.predict({}).read_text())
    assert person.counts == (1, 1)
    content["images"].pop()
    (person.folder / "of_image.json").write_text(json.dumps(content))
    dataset = InstanceDataset(person.folder, person.folder / "of_image.json", labels=("person",))
    masks = dataset.read(0).masks
    assert masks is not None
    both, either = (masks[0] & person.mask).sum(), (masks[0] | person.mask).sum()
    assert both > 0.8 * either


def test_a_mask_is_kept_only_where_the_visible_keypoints_lie_in_it(person: Person) -> None:
    rows, columns = np.nonzero(person.mask)
    inside = float(columns[len(rows) // 2]), float(rows[len(rows) // 2])
    assert person.has_mask(keypoints=keypoints((*inside, 2), (1, 1, 1), (0, 0, 0)))
    assert not person.has_mask(keypoints=keypoints((*inside, 2), (1, 1, 2)))


def test_a_mask_that_does_not_fill_its_box_is_not_kept(person: Person) -> None:
    assert not person.has_mask(bbox=[0.0, 0.0, person.width / 5, float(person.height)])


def test_a_person_larger_than_the_network_was_trained_for_gets_no_mask(person: Person) -> None:
    assert not person.has_mask(bbox=[0.0, 0.0, float(person.width), float(person.height)])


def test_small_boxes_crowds_and_other_classes_get_no_mask(person: Person) -> None:
    x, y, *_ = person.box
    assert not person.has_mask(bbox=[x, y, 12.0, 40.0])
    assert not person.has_mask(iscrowd=1)
    assert not person.has_mask(category_id=4)


def test_masks_of_several_instances_go_to_their_own_annotations(person: Person) -> None:
    content = json.loads(person.predict({}, {"iscrowd": 1}, {}).read_text())
    masked = [bool(annotation["segmentation"]) for annotation in content["annotations"]]
    assert masked == [True, False, True]
    assert person.counts == (2, 2)
