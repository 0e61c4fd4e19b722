"""Compare an engine's instances with torch's, on given images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from maskcast.builder.build import build
from maskcast.builder.checkpoint.checkpoint import load_bundle_weights, load_network
from maskcast.builder.network.network import build_network, network_config
from maskcast.engines.bundle import Bundle, FixedInput, open_bundle
from maskcast.engines.engine import Engine
from maskcast.engines.image import NetworkImage, fit_image


def open_model(name: str, scratch: Path, size: tuple[int, int]) -> tuple[Bundle, Any]:
    """Return a model as a bundle of portable graphs and as a torch network in eval mode."""
    if name == "default":
        bundle = open_bundle("default")
        network = build_network(network_config("lite0-fpn", bundle.manifest.labels[1:]))
        load_bundle_weights(network, bundle)
    else:
        _, network = load_network(name)
        bundle = build(name, scratch / "portable", size=size)
    network.eval().transform.min_size, network.transform.max_size = (min(size),), max(size)
    return bundle, network


def read_images(folder: Path | None, size: tuple[int, int], count: int) -> list[NetworkImage]:
    """Read up to ``count`` images from a folder; noise if none is given."""
    shape = FixedInput(*size, 127)
    if folder is None:
        noise = np.random.default_rng(0).integers(0, 256, (4, *size, 3), np.uint8)
        return [NetworkImage(pixels, size, size) for pixels in noise]
    images = []
    for path in sorted(folder.iterdir())[:count]:
        rgb = np.array(Image.open(path).convert("RGB"))
        images.append(fit_image(av.VideoFrame.from_ndarray(rgb, "rgb24"), 0, shape))
    return images


def run_torch(network: Any, image: NetworkImage, device: str) -> dict[str, NDArray[Any]]:
    """Run torchvision's modules on an image in the network's size: boxes, scores, mask crops."""
    height, width = image.content
    with torch.inference_mode():
        pixels = torch.from_numpy(image.pixels[:height, :width]).to(device)
        normalised = network.transform.normalize(pixels.permute(2, 0, 1) / 255)
        padded = torch.zeros((1, 3, *image.pixels.shape[:2]), device=device)
        padded[0, :, :height, :width] = normalised
        sized = ImageList(padded, [(height, width)])
        features = network.backbone(padded)
        proposals, _ = network.rpn(sized, features)
        (found,), _ = network.roi_heads(features, proposals, sized.image_sizes)
    return {name: found[name].cpu().numpy() for name in ("boxes", "scores", "labels", "masks")}


def parity(
    engine: Engine, network: Any, images: Sequence[NetworkImage], device: str, min_score: float
) -> dict[str, float]:
    """Compare the engine's instances with torch's, image by image.

    A box of torch is matched by the engine's box of the same label that overlaps it most, if their
    IoU is 0.7 or more.
    """
    counts = {"torch": 0, "engine": 0, "matched": 0}
    ious: list[float] = []
    scores: list[float] = []
    masks: list[float] = []
    for image in images:
        wanted = run_torch(network, image, device)
        kept = wanted["scores"] >= min_score
        # In the network's pixels, so that the engine does not scale back to the source.
        here = NetworkImage(image.pixels, image.content, image.content)
        (found,) = engine.segment(engine.detect([here], min_score))
        counts["torch"] += int(kept.sum())
        counts["engine"] += len(found)
        if not kept.any() or len(found) == 0:
            continue
        overlap = box_iou(torch.from_numpy(wanted["boxes"][kept]), torch.from_numpy(found.boxes))
        overlap *= torch.from_numpy(wanted["labels"][kept][:, None] == found.labels[None])
        for i, (iou, j) in enumerate(zip(*(t.tolist() for t in overlap.max(dim=1)), strict=True)):
            if iou < 0.7:
                continue
            counts["matched"] += 1
            ious.append(iou)
            scores.append(abs(float(wanted["scores"][kept][i] - found.scores[j])))
            if isinstance(found.masks, np.ndarray):
                crop = wanted["masks"][kept][i, 0]
                masks.append(float(np.abs(crop - found.masks[j] / 255).mean()))
    mean = statistics.fmean
    return {
        **counts,
        "iou_mean": mean(ious) if ious else 0.0,
        "score_difference_mean": mean(scores) if scores else 0.0,
        "mask_difference_mean": mean(masks) if masks else 0.0,
    }
