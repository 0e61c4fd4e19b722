"""Results of torchvision, and images, networks and bundles for tests that compare with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle, GraphFile, open_bundle
from maskcast.engines.engine import Engine
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.keypoints import COCO_PERSON, decode_heatmaps

PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def draw_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw shapes of many sizes on a smooth background, with noise, like a photograph."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = np.random.default_rng(seed)
    blots = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = np.exp(rng.uniform(np.log(8), np.log(height / 3), 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x - rx, y - ry, x + rx, y + ry), fill=colour, outline=(0, 0, 0))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float64)
    return (blurred + rng.normal(0, 6, blurred.shape)).clip(0, 255).astype(np.uint8)


def draw_people(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw an image into which the photograph of a person is pasted three times."""
    from PIL import Image, ImageOps

    rng = np.random.default_rng(seed)
    image = Image.fromarray(draw_image(height, width, seed))
    with Image.open(PORTRAIT) as photograph:
        portrait = photograph.convert("RGB")
    for place in range(3):
        rows = int(rng.uniform(0.5, 0.95) * height)
        person = portrait.resize((rows * portrait.width // portrait.height, rows))
        if rng.random() < 0.5:
            person = ImageOps.mirror(person)
        left = int((place + rng.uniform(0.2, 0.4)) * width / 3 - person.width / 4)
        image.paste(person, (left, height - rows))
    return np.asarray(image)


def assert_refuses_calls_when_closed(engine: Engine, images: Sequence[NetworkImage]) -> None:
    """Check that ``detect`` and ``segment`` of a closed engine say so; closes the engine."""
    detections = engine.detect(images, 0.1)
    engine.close()
    for use in (lambda: engine.detect(images, 0.1), lambda: engine.segment(detections)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            use()


class Truth(NamedTuple):
    """What torchvision's own modules find in an image, in the network's input pixels."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32] | None
    keypoints: NDArray[np.float32] | None = None
    """``[N, K, 3]``: x, y and the logit at that point."""
    heatmaps: NDArray[np.float32] | None = None

    def assert_posed(self, keypoints: NDArray[np.float32]) -> None:
        """Check that each keypoint is within 0.1 px and its score within 1e-3, in the same order.

        Where two places of a heatmap have almost the same value, either may be found.
        """
        assert self.keypoints is not None
        assert self.heatmaps is not None
        expected = decode_heatmaps(self.heatmaps, self.boxes)
        np.testing.assert_allclose(expected[..., :2], self.keypoints[..., :2], atol=0.1)
        assert keypoints.shape == expected.shape
        is_near = (np.abs(keypoints[..., :2] - expected[..., :2]) < 0.1).all(axis=2)
        assert is_near.mean() > 0.97
        np.testing.assert_allclose(keypoints[is_near, 2], expected[is_near, 2], atol=1e-3)
        for box, k in np.argwhere(~is_near):
            x1, y1, x2, y2 = self.boxes[box]
            column, row = (keypoints[box, k, :2] - (x1, y1)) / (x2 - x1, y2 - y1) * 56
            cell = self.heatmaps[box, k, min(int(row), 55), min(int(column), 55)]
            assert cell > self.heatmaps[box, k].max() - 0.2

    def assert_seen(
        self,
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        labels: NDArray[np.integer[Any]],
        masks: NDArray[Any] | None,
    ) -> None:
        """Check each detection: box within 0.1 px, score within 1e-3, mask 0.01 and rounding.

        Detections of almost the same score may be in another order, and one that just missed the
        limit of detections may replace another.
        """
        assert len(boxes) == len(self.boxes)
        left = list(range(len(boxes)))
        for index, box in enumerate(self.boxes):
            like = [
                other
                for other in left
                if labels[other] == self.labels[index]
                and abs(scores[other] - self.scores[index]) < 1e-3
                and np.abs(boxes[other] - box).max() < 0.1
            ]
            if not like and len(boxes) == 100 and self.scores[index] - self.scores.min() < 1e-4:
                continue
            assert like, f"nothing like detection {index}: {box} {self.scores[index]}"
            left.remove(like[0])
            if masks is not None and self.masks is not None:
                assert np.abs(masks[like[0]] - self.masks[index]).max() < 0.01 + 0.5 / 255


def see_with_torchvision(
    network: Any, rgb: NDArray[np.uint8], canvas: tuple[int, int] | None = None
) -> Truth:
    """Run torchvision's modules on an image, without resizing it or pasting the masks.

    The image is at the top left of the canvas, whose sides are by default the next multiples of 32.
    """
    import torch
    from torchvision.models.detection.image_list import ImageList

    height, width = rgb.shape[:2]
    rows, columns = canvas or (height + -height % 32, width + -width % 32)
    with torch.no_grad():
        image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1) / 255
        batch = torch.zeros(1, 3, rows, columns)
        batch[0, :, :height, :width] = network.transform.normalize(image)
        images = ImageList(batch, [(height, width)])
        features = network.backbone(batch)
        proposals, _ = network.rpn(images, features)
        (found,), _ = network.roi_heads(features, proposals, images.image_sizes)
        heatmaps = None
        if "keypoints" in found:
            heads, boxes = network.roi_heads, [found["boxes"]]
            pooled = heads.keypoint_roi_pool(features, boxes, images.image_sizes)
            heatmaps = heads.keypoint_predictor(heads.keypoint_head(pooled)).numpy()
    masks = found["masks"][:, 0].numpy() if "masks" in found else None
    keypoints = found["keypoints"].numpy() if "keypoints" in found else None
    boxes, scores, labels = (found[name].numpy() for name in ("boxes", "scores", "labels"))
    return Truth(boxes, scores, labels, masks, keypoints, heatmaps)


def fit(rgb: NDArray[np.uint8], pad_value: int = 99) -> NetworkImage:
    """Pad an image to multiples of 32, without resizing it."""
    height, width = rgb.shape[:2]
    rows, columns = -height % 32, -width % 32
    pixels = np.pad(rgb, ((0, rows), (0, columns), (0, 0)), constant_values=pad_value)
    return NetworkImage(pixels, (height, width), (height, width))


def posing_config() -> Any:
    """Return torchvision's keypointrcnn_resnet50_fpn with the classes of ``parity.network``.

    With 100 boxes per image, its keypoint branch would take most of the tests' time.
    """
    from msgspec.structs import replace

    from maskcast.builder.network.network import network_config

    labels = tuple("abcdefghijklmnopqrst")
    config = network_config("resnet50-fpn", labels, with_masks=False, keypoints=COCO_PERSON)
    return replace(config, detections_per_image=8)


@pytest.fixture(scope="session")
def parity() -> Parity:
    """Return what parity tests share: images, torchvision's results, and networks."""
    return Parity()


class Parity:
    truth = Truth
    draw_image = staticmethod(draw_image)
    draw_people = staticmethod(draw_people)
    see_with_torchvision = staticmethod(see_with_torchvision)
    fit = staticmethod(fit)

    @functools.cached_property
    def network(self) -> Any:
        """A Mask R-CNN (ResNet-50-FPN, 20 classes) with random weights whose outputs vary.

        Plain random weights give equal scores and boxes that do not move, which tell nothing about
        an implementation. So each norm takes the statistics of its input, and the last layers are
        scaled to give outputs like those of trained ones.
        """
        import torch
        from torch.nn import Module
        from torchvision.ops.misc import FrozenBatchNorm2d

        from maskcast.builder.network.network import build_network, network_config

        torch.manual_seed(0)
        network = build_network(network_config("resnet50-fpn", tuple("abcdefghijklmnopqrst")))
        network.transform.min_size, network.transform.max_size = (320,), 576
        heads = network.roi_heads
        spread = {
            network.rpn.head.cls_logits: 2.0,
            network.rpn.head.bbox_pred: 0.3,
            heads.box_predictor.cls_score: 1.8,
            heads.box_predictor.bbox_pred: 0.5,
            heads.mask_predictor.mask_fcn_logits: 1.0,
        }

        def set_statistics(norm: Module, inputs: tuple[torch.Tensor]) -> None:
            norm.get_buffer("running_mean").copy_(inputs[0].mean((0, 2, 3)))
            norm.get_buffer("running_var").copy_(inputs[0].var((0, 2, 3)))

        def scale(layer: Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
            deviation = spread.pop(layer, None)  # the RPN's head runs once per level: only on P2
            if deviation is None:
                return None
            others = [axis for axis in range(output.ndim) if axis != 1]
            channels = [1, -1, *[1] * (output.ndim - 2)]
            factor, mean = deviation / output.std(others), output.mean(others)
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
            bias.copy_((bias - mean) * factor)
            return (output - mean.reshape(channels)) * factor.reshape(channels)

        hooks = [
            module.register_forward_pre_hook(set_statistics)
            for module in network.modules()
            if isinstance(module, FrozenBatchNorm2d)
        ]
        hooks += [layer.register_forward_hook(scale) for layer in spread]
        with torch.no_grad():
            network.eval()
            network([torch.from_numpy(draw_image(320, 576)).permute(2, 0, 1) / 255])
        for hook in hooks:
            hook.remove()
        return network

    @functools.cached_property
    def posing_network(self) -> Any:
        """The same with the keypoint branch of torchvision's keypointrcnn_resnet50_fpn, no masks.

        Its weights are random too, scaled so that heatmaps have clear peaks.
        """
        import torch

        from maskcast.builder.network.network import build_network

        torch.manual_seed(0)
        network = build_network(posing_config()).eval()
        network.load_state_dict(self.network.state_dict(), strict=False)
        network.transform.min_size, network.transform.max_size = (320,), 576
        predictor = network.roi_heads.keypoint_predictor.kps_score_lowres
        torch.nn.init.normal_(predictor.weight)
        found = see_with_torchvision(network, draw_image(320, 576))
        assert found.heatmaps is not None
        with torch.no_grad():
            predictor.weight.mul_(4 / float(found.heatmaps.std()))
        return network

    @functools.cached_property
    def poses(self) -> list[tuple[NDArray[np.uint8], Truth]]:
        """The images of ``truths``, and what torchvision's keypoint network finds in them."""
        images = [rgb for rgb, _ in self.truths]
        return [(rgb, see_with_torchvision(self.posing_network, rgb)) for rgb in images]

    @functools.cached_property
    def default_network(self) -> Any:
        """The network of the bundle that comes with the package."""
        from maskcast.builder.checkpoint.checkpoint import load_bundle_weights
        from maskcast.builder.network.network import build_network, network_config

        bundle = open_bundle("default")
        network = build_network(network_config("lite0-fpn", bundle.manifest.labels[1:]))
        load_bundle_weights(network, bundle)
        return network.eval()

    @functools.cached_property
    def truths(self) -> list[tuple[NDArray[np.uint8], Truth]]:
        """Two images, one of which must be padded, and what torchvision finds in them."""
        images = [draw_image(320, 576), draw_image(250, 440, seed=1)]
        return [(rgb, see_with_torchvision(self.network, rgb)) for rgb in images]


@pytest.fixture(scope="session")
def posing_bundle(unthresholded_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return ``unthresholded_bundle`` with a poser of random weights."""
    import msgspec
    import onnx
    import torch
    from msgspec.structs import replace

    from maskcast.builder.graph.export import export_poser
    from maskcast.builder.network.network import build_network, network_config
    from maskcast.engines.bundle import MANIFEST, sha256
    from maskcast.engines.instances.keypoints import COCO_PERSON

    folder = tmp_path_factory.mktemp("posing")
    for name in ("detector.onnx", "segmenter.onnx"):
        (folder / name).write_bytes((unthresholded_bundle.path / name).read_bytes())
    torch.manual_seed(0)
    config = network_config("lite0-fpn", ("person",), keypoints=COCO_PERSON)
    network = build_network(config).eval()
    # With the initial weights, all places are equally likely.
    torch.nn.init.normal_(network.roi_heads.keypoint_predictor.kps_score_lowres.weight, std=0.2)
    onnx.save(export_poser(network), folder / "poser.onnx")
    graphs = replace(
        unthresholded_bundle.manifest.graphs,
        poser=GraphFile("poser.onnx", sha256(folder / "poser.onnx")),
    )
    manifest = replace(
        unthresholded_bundle.manifest,
        graphs=graphs,
        keypoints=COCO_PERSON,
        keypoint_blur_cells=config.keypoint_blur_cells,
    )
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return open_bundle(folder)


@pytest.fixture(scope="session")
def calibrated_bundle(parity: Parity, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Build the bundle of ``parity.network`` from a checkpoint, as users do."""
    from maskcast.builder.build import build
    from maskcast.builder.checkpoint.checkpoint import save_model
    from maskcast.builder.network.network import network_config

    folder = tmp_path_factory.mktemp("calibrated")
    config = network_config("resnet50-fpn", tuple("abcdefghijklmnopqrst"))
    save_model(folder / "model.pth", config, parity.network.state_dict(), {})
    return build(folder / "model.pth", folder / "bundle", size=(320, 576))


@pytest.fixture(scope="session")
def keypoint_bundle(parity: Parity, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Build the bundle of ``parity.posing_network`` from a checkpoint."""
    from maskcast.builder.build import build
    from maskcast.builder.checkpoint.checkpoint import save_model

    folder = tmp_path_factory.mktemp("keypoints")
    state = parity.posing_network.state_dict()
    save_model(folder / "model.pth", posing_config(), state, {})
    return build(folder / "model.pth", folder / "bundle", size=(320, 576))


@pytest.fixture(scope="session")
def float_default(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Build the default model in fp32, in which its weights are exact."""
    from maskcast.builder.build import build

    return build("default", tmp_path_factory.mktemp("default") / "fp32")


@pytest.fixture(scope="session")
def unthresholded_bundle(float_default: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Build the default model with its internal score threshold at 0: 100 detections per image."""
    import onnx
    from msgspec.structs import replace

    from maskcast.engines.bundle import sha256

    default = float_default
    graph = onnx.load(default.detector)
    *_, last_nms = (node for node in graph.graph.node if node.op_type == "GroupedNms")
    (threshold,) = (item for item in last_nms.attribute if item.name == "score_threshold")
    threshold.f = 0.0
    folder = tmp_path_factory.mktemp("unthresholded")
    onnx.save(graph, folder / "detector.onnx")
    assert default.segmenter is not None
    (folder / "segmenter.onnx").write_bytes(default.segmenter.read_bytes())
    graphs = replace(
        default.manifest.graphs,
        detector=GraphFile("detector.onnx", sha256(folder / "detector.onnx")),
        poser=None,
    )
    return Bundle(folder, replace(default.manifest, graphs=graphs, keypoints=None))
