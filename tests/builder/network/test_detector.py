from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from maskcast.builder.network.detector import Detector, Poser, Segmenter
from maskcast.builder.network.network import build_network, network_config
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import decode_heatmaps


def detect(detector: Detector, *images: Any) -> list[torch.Tensor]:
    pixels = torch.stack([torch.from_numpy(image.pixels).permute(2, 0, 1) for image in images])
    sizes = torch.tensor([image.content for image in images], dtype=torch.float32)
    with torch.no_grad():
        return list(detector(pixels.float(), sizes))


@contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    before = {key: getattr(module, key) for key in values}
    for key, value in values.items():
        setattr(module, key, value)
    yield
    for key, value in before.items():
        setattr(module, key, value)


def test_detector_and_segmenter_see_what_torchvision_sees(parity: Any) -> None:
    detector, segmenter = Detector(parity.network), Segmenter(parity.network)
    for rgb, truth in parity.truths:
        boxes, scores, labels, counts, *features = detect(detector, parity.fit(rgb))
        count = int(counts[0])
        with torch.no_grad():
            masks = segmenter(
                *features, boxes[0, :count], labels[0, :count], torch.zeros(count).int()
            )
        truth.assert_seen(
            boxes[0, :count].numpy(),
            scores[0, :count].numpy(),
            labels[0, :count].numpy(),
            masks.numpy(),
        )


def test_the_poser_sees_what_torchvision_sees(parity: Any) -> None:
    detector, poser = Detector(parity.posing_network), Poser(parity.posing_network)
    for rgb, truth in parity.poses:
        *_, p2, p3, p4, p5 = detect(detector, parity.fit(rgb))
        boxes = torch.from_numpy(truth.boxes)
        with torch.no_grad():
            heatmaps = poser(p2, p3, p4, p5, boxes, torch.zeros(len(boxes)).int())
        np.testing.assert_allclose(heatmaps.numpy(), truth.heatmaps, atol=1e-3)
        truth.assert_posed(decode_heatmaps(heatmaps.numpy(), truth.boxes))


def test_each_image_of_a_batch_is_seen_as_if_it_were_alone(parity: Any) -> None:
    detector = Detector(parity.network)
    left = parity.fit(parity.draw_image(128, 160, seed=2))
    right = parity.fit(parity.draw_image(100, 150, seed=3))
    together = detect(detector, left, right)
    for index, image in enumerate((left, right)):
        alone = detect(detector, image)
        expected = parity.truth(*(output[0].numpy() for output in alone[:3]), masks=None)
        expected.assert_seen(*(output[index].numpy() for output in together[:3]), masks=None)
        assert together[3][index] == alone[3][0]


def test_what_the_padding_holds_does_not_matter(parity: Any) -> None:
    rgb = parity.draw_image(100, 150, seed=3)
    detector = Detector(parity.network)
    black, white = (detect(detector, parity.fit(rgb, pad_value=value)) for value in (0, 255))
    for output, other in zip(black, white, strict=True):
        torch.testing.assert_close(output, other)


def test_boxes_end_where_the_content_ends(parity: Any) -> None:
    boxes, _, _, counts, *_ = detect(
        Detector(parity.network), parity.fit(parity.draw_image(100, 150, seed=3))
    )
    found = boxes[0, : int(counts[0])]
    assert len(found)
    assert found.min() >= 0
    assert found[:, 2].max() <= 150
    assert found[:, 3].max() <= 100


def test_places_without_a_detection_are_zero(parity: Any) -> None:
    with changed(parity.network.roi_heads, score_thresh=0.9):
        boxes, scores, labels, counts, *_ = detect(
            Detector(parity.network), parity.fit(parity.draw_image(128, 160, seed=2))
        )
    count = int(counts[0])
    assert 0 < count < 100
    assert (scores[0, :count] > 0.9).all()
    assert not boxes[0, count:].any()
    assert not scores[0, count:].any()
    assert not labels[0, count:].any()


def test_padded_proposals_never_become_detections(parity: Any) -> None:
    # A small image has fewer proposals than there are places for.
    rgb = parity.draw_image(64, 64, seed=4)
    with changed(parity.network.roi_heads, score_thresh=0.0):
        truth = parity.see_with_torchvision(parity.network, rgb)
        boxes, scores, labels, counts, *_ = detect(Detector(parity.network), parity.fit(rgb))
    count = int(counts[0])
    truth.assert_seen(
        boxes[0, :count].numpy(), scores[0, :count].numpy(), labels[0, :count].numpy(), None
    )


def test_few_candidates_give_a_prefix_of_the_detections(parity: Any) -> None:
    # The cut before the last NMS may cost detections at the end of the list, never at its head.
    image = parity.fit(parity.draw_image(128, 160, seed=2))
    whole = detect(Detector(parity.network), image)
    cut = detect(Detector(parity.network, candidates=40), image)
    count = int(cut[3][0])
    assert 0 < count < int(whole[3][0])
    np.testing.assert_allclose(cut[0][0, :count], whole[0][0, :count], atol=1e-3)


def test_detectron2s_alignment_is_kept() -> None:
    config = network_config("resnet50-fpn", ("thing",))
    aligned = build_network(type(config)(labels=("thing",), roi_align_aligned=True))
    assert Detector(aligned).pooling == (7, 2, True)
    assert Segmenter(aligned).pooling == (14, 2, True)
    assert Detector(build_network(config)).pooling == (7, 2, False)


def test_another_pyramid_is_refused_in_one_line() -> None:
    other = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(InputError, match="P2 to P5"):
        Detector(other)
