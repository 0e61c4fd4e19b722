"""Checkpoints: weights on disk, in the formats of maskcast, torchvision and detectron2.

Nothing in a checkpoint is executed.
"""

import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor
from torchvision.models import get_model_weights

from maskcast.builder.checkpoint import detectron2
from maskcast.builder.checkpoint.array_pickle import read_pickle
from maskcast.builder.graph.quantization import restore_float
from maskcast.builder.network.network import NetworkConfig, build_network, network_config
from maskcast.engines.bundle import Bundle
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints

FORMAT = 1

# The preset of each of torchvision's checkpoints, by name.
TORCHVISION = {
    "maskrcnn_resnet50_fpn/COCO_V1": "resnet50-fpn",
    "maskrcnn_resnet50_fpn_v2/COCO_V1": "resnet50-fpn-v2",
    "fasterrcnn_resnet50_fpn/COCO_V1": "resnet50-fpn",
    "fasterrcnn_resnet50_fpn_v2/COCO_V1": "resnet50-fpn-v2",
    "keypointrcnn_resnet50_fpn/COCO_V1": "resnet50-fpn",
}


def load_checkpoint(source: str | Path) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Load a checkpoint of any known format, recognised by its content.

    Args:
        source: a file of ``maskcast train`` (``model.pth``), of torchvision's weights (``.pth``) or
            of detectron2's (``.pkl``, ``.pth``); or the name of torchvision weights, a key of
            ``TORCHVISION``, which are then downloaded.

    Returns:
        The configuration for ``build_network`` and the state of the network.

    Raises:
        InputError: there is no such file or name, or it is damaged or of another architecture.
    """
    config, network = load_network(source)
    return config, network.state_dict()


def load_network(source: str | Path) -> tuple[NetworkConfig, Any]:
    """Load a checkpoint, as ``load_checkpoint``, into a network in evaluation mode."""
    if str(source) in TORCHVISION:
        config, state = _download(str(source))
    else:
        path = Path(source)
        if not path.exists() and not path.suffix:
            raise InputError(
                f"{source}: no such checkpoint; give a file or one of {', '.join(TORCHVISION)}"
            )
        if path.suffix == ".onnx":
            raise InputError(f"{path}: a graph of a bundle; give the folder of the bundle")
        content = read_pickle(path) if path.suffix == ".pkl" else read_state(path)
        config, state = _recognise(content, path)
    network = build_network(config)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(
            f"{source}: not the weights of a {config.backbone} network ({reasons[0][:120]})"
        ) from None
    return config, network.eval()


def _download(name: str) -> tuple[NetworkConfig, dict[str, Tensor]]:
    model, version = name.split("/")
    weights = get_model_weights(model)[version]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise InputError(f"{name}: cannot download the weights ({error})") from None
    return _torchvision_config(state), state


def _recognise(content: dict[str, Any], path: Path) -> tuple[NetworkConfig, dict[str, Tensor]]:
    if "format" in content and "network" in content:
        if content["format"] != FORMAT:
            raise InputError(
                f"{path}: format {content['format']} is not supported; "
                f"give a file of format {FORMAT}"
            )
        try:
            return msgspec.convert(content["network"], NetworkConfig), content["model"]
        except (KeyError, msgspec.ValidationError) as error:
            raise InputError(f"{path}: its configuration is damaged ({error})") from None
    if "run" in content and "optimizer" in content:
        raise InputError(
            f"{path}: the state of an unfinished training run; give the model.pth that a finished "
            "run leaves in the same folder"
        )
    state = content.get("model", content)
    if isinstance(state, dict) and all(isinstance(key, str) for key in state):
        if detectron2.is_detectron2(state):
            try:
                return detectron2.convert(state)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        if isinstance(state.get("roi_heads.box_predictor.cls_score.bias"), Tensor):
            return _torchvision_config(state), state
    raise InputError(f"{path}: not a checkpoint of an R-CNN of maskcast, torchvision or detectron2")


def _torchvision_config(state: dict[str, Tensor]) -> NetworkConfig:
    """Recognise torchvision's network by its weights.

    torchvision's first COCO_V1 weights were trained with frozen batch norms whose epsilon is 0, its
    later ones with 1e-5. They are recognised by their 91 classes, or by the person with 17
    keypoints.
    """
    is_v2 = "backbone.fpn.inner_blocks.0.1.weight" in state
    preset = "resnet50-fpn-v2" if is_v2 else "resnet50-fpn"
    if "backbone.body.layer3.22.conv1.weight" in state:
        preset = "resnet101-fpn"
    classes = len(state["roi_heads.box_predictor.cls_score.bias"])
    with_masks = "roi_heads.mask_predictor.mask_fcn_logits.weight" in state
    categories = get_model_weights("maskrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]
    is_coco = classes == len(categories)
    labels = categories[1:] if is_coco else [f"class {i}" for i in range(1, classes)]
    config = network_config(preset, tuple(labels), with_masks)
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in state:
        config = _with_keypoints(config, state)
        is_coco = is_coco or config.keypoints == COCO_PERSON
    is_first = is_coco and preset == "resnet50-fpn"
    return msgspec.structs.replace(config, frozen_norm_epsilon=0.0) if is_first else config


def _with_keypoints(config: NetworkConfig, state: dict[str, Tensor]) -> NetworkConfig:
    """Describe the keypoint branch of a state; torchvision's weights have those of a person."""
    channels, count = state["roi_heads.keypoint_predictor.kps_score_lowres.weight"].shape[:2]
    is_person = len(config.labels) == 1 and count == len(COCO_PERSON)
    names = tuple(f"keypoint {i}" for i in range(1, count + 1))
    prefix = "roi_heads.keypoint_head."
    return msgspec.structs.replace(
        config,
        labels=("person",) if is_person else config.labels,
        keypoints=COCO_PERSON if is_person else Keypoints(names),
        keypoint_head_channels=channels,
        keypoint_head_layers=sum(k.startswith(prefix) and k.endswith(".weight") for k in state),
    )


def save_model(
    path: Path, config: NetworkConfig, state: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Write a model in maskcast's format: tensors and builtins only.

    Args:
        path: file to write.
        config: configuration of the network.
        state: weights of the network.
        training: builtins that describe the training run and the scores.
    """
    content = {
        "format": FORMAT,
        "network": msgspec.to_builtins(config),
        "labels": list(config.labels),
        "model": {key: value.contiguous() for key, value in state.items()},
        "training": training,
    }
    save_atomically(content, path)


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; an old one stays until the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_state(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save``.

    Raises:
        InputError: the file is missing, truncated, or holds more than tensors and builtins.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # arbitrary bytes can raise any exception
        raise InputError(f"{path}: {_unreadable(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint, it holds a {type(content).__name__}")
    return content


def _unreadable(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
        return (
            "holds more than tensors and builtins, perhaps a whole model; give a file that "
            "torch.save(model.state_dict(), FILE) wrote"
        )
    return "not a checkpoint, or damaged or truncated"


def load_matching(network: Any, state: dict[str, Tensor]) -> list[str]:
    """Load the weights whose names and shapes match those of a network.

    Returns:
        The names of the network's weights that ``state`` lacks or has in another shape.
    """
    own = network.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    return [key for key in own if key not in fitting]


def load_bundle_weights(network: Any, bundle: Bundle) -> None:
    """Load the weights of a bundle into a network of the same kind.

    The weights of an int8 bundle are rounded. If normalisations are folded into its convolutions,
    those of the network are set to the identity.

    Args:
        network: from ``maskcast.builder.network.network.build_network``; if it has no
            keypoint branch, the weights of the bundle's are not used.
        bundle: of any backend and precision.

    Raises:
        InputError: the bundle was built from another network.
    """
    state: dict[str, Tensor] = {}
    for name, file in bundle.manifest.graphs.present.items():
        if name == "poser" and not network.roi_heads.has_keypoint():
            continue
        graph = onnx.load(bundle.path / file.file)
        restore_float(graph)
        state |= _weights(graph)
    for name, module in network.named_modules():
        if hasattr(module, "running_var") and f"{name}.running_var" not in state:
            one = torch.ones_like(module.running_var)
            state |= {f"{name}.weight": one, f"{name}.running_var": one - module.eps}
            state[f"{name}.running_mean"] = torch.zeros_like(one)
    # Bundles do not hold the batch counters of norms.
    wanted = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    if wanted != state.keys():
        different = min(wanted ^ state.keys())
        raise InputError(f"{bundle.path}: of another network (they differ in {different!r})")
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # tensors of another shape
        raise InputError(
            f"{bundle.path}: of another network ({str(error).splitlines()[-1].strip()})"
        ) from None


def _weights(graph: ModelProto) -> dict[str, Tensor]:
    """Read the weights inside a graph, float32, under the keys of the model's ``state_dict``."""
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))
        for tensor in graph.graph.initializer
        if tensor.name.startswith(("backbone.", "rpn.", "roi_heads."))
    }
