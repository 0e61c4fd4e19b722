from pathlib import Path

import pytest
import torch
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    KeypointRCNN_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)

from maskcast.builder.checkpoint.checkpoint import (
    load_checkpoint,
    load_matching,
    load_network,
    read_state,
    save_atomically,
    save_model,
)
from maskcast.builder.network.network import build_network, network_config
from maskcast.engines.bundle import default_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON

CONFIG = network_config("lite0-fpn", ("person", "dog"))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(CONFIG)


@pytest.fixture
def saved(network, tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    save_model(path, CONFIG, network.state_dict(), {"images": 3})
    return path


def test_a_saved_model_loads_unchanged(network, saved: Path) -> None:
    config, state = load_checkpoint(saved)
    assert config == CONFIG
    assert state.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value)


def test_the_file_holds_only_tensors_and_builtins(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert content["format"] == 1
    assert content["labels"] == ["person", "dog"]
    assert content["training"] == {"images": 3}
    assert content["network"]["backbone"] == "lite0"


def test_a_loaded_network_is_ready_to_predict(saved: Path) -> None:
    _, network = load_network(str(saved))
    assert not network.training


@pytest.mark.parametrize(
    ("original", "classes", "preset_of", "epsilon"),
    [
        (maskrcnn_resnet50_fpn, 91, ("resnet50", "paper", True), 0.0),
        (maskrcnn_resnet50_fpn, 3, ("resnet50", "paper", True), 1e-5),
        (maskrcnn_resnet50_fpn_v2, 91, ("resnet50", "v2", True), 1e-5),
        (fasterrcnn_resnet50_fpn, 91, ("resnet50", "paper", False), 0.0),
    ],
)
def test_torchvisions_weights_are_recognised(
    tmp_path: Path, original, classes: int, preset_of, epsilon: float
) -> None:
    theirs = original(weights=None, weights_backbone=None, num_classes=classes)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    config, state = load_checkpoint(path)
    assert (config.backbone, config.heads, config.with_masks) == preset_of
    assert config.frozen_norm_epsilon == epsilon
    assert len(config.labels) == classes - 1
    assert config.labels[0] == ("person" if classes == 91 else "class 1")
    name = "roi_heads.box_head.fc7.weight"
    if name in state:
        assert torch.equal(state[name], theirs.state_dict()[name])


@pytest.mark.parametrize(("points", "epsilon"), [(17, 0.0), (5, 1e-5)])
def test_torchvisions_keypoint_weights_are_recognised(
    tmp_path: Path, points: int, epsilon: float
) -> None:
    theirs = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_keypoints=points)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    config, state = load_checkpoint(path)
    assert not config.with_masks
    assert config.frozen_norm_epsilon == epsilon
    assert (config.keypoint_head_channels, config.keypoint_head_layers) == (512, 8)
    assert config.keypoints is not None
    if points == 17:
        assert config.keypoints == COCO_PERSON
        assert config.labels == ("person",)
    else:
        assert config.keypoints.names == tuple(f"keypoint {i}" for i in range(1, 6))
        assert config.labels == ("class 1",)
    name = "roi_heads.keypoint_predictor.kps_score_lowres.weight"
    assert torch.equal(state[name], theirs.state_dict()[name])


def test_torchvisions_keypoint_weights_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()

    def download(weights: WeightsEnum, **options: bool) -> dict[str, torch.Tensor]:
        assert weights is KeypointRCNN_ResNet50_FPN_Weights.COCO_V1
        assert options["check_hash"]
        return theirs

    monkeypatch.setattr(WeightsEnum, "get_state_dict", download)
    config, _ = load_checkpoint("keypointrcnn_resnet50_fpn/COCO_V1")
    assert config.keypoints == COCO_PERSON


def test_the_old_names_of_torchvisions_first_weights_load(tmp_path: Path) -> None:
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    state = dict(theirs.state_dict())
    for layer in range(4):
        for kind in ("weight", "bias"):
            state[f"roi_heads.mask_head.mask_fcn{layer + 1}.{kind}"] = state.pop(
                f"roi_heads.mask_head.{layer}.0.{kind}"
            )
            state[f"backbone.fpn.inner_blocks.{layer}.{kind}"] = state.pop(
                f"backbone.fpn.inner_blocks.{layer}.0.{kind}"
            )
            state[f"backbone.fpn.layer_blocks.{layer}.{kind}"] = state.pop(
                f"backbone.fpn.layer_blocks.{layer}.0.{kind}"
            )
    path = tmp_path / "old.pth"
    torch.save(state, path)
    _, loaded = load_checkpoint(path)
    expected = theirs.state_dict()["roi_heads.mask_head.2.0.weight"]
    assert torch.equal(loaded["roi_heads.mask_head.2.0.weight"], expected)


def test_a_truncated_file_is_an_input_error_of_one_line(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:100_000])
    with pytest.raises(InputError, match="truncated") as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def test_a_file_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "malicious.pth"
    torch.save({"model": Malicious()}, path)
    with pytest.raises(InputError, match="more than tensors"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"layer.weight": torch.zeros(1)}, "not a checkpoint of an R-CNN"),
        ([1, 2], "holds a list"),
        ({"format": 2, "network": {}, "model": {}}, "format 2 is not supported"),
        ({"format": 1, "network": {"labels": 3}, "model": {}}, "configuration is damaged"),
    ],
)
def test_anything_else_is_an_input_error(tmp_path: Path, content, complaint: str) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=complaint):
        load_checkpoint(path)


def test_a_whole_model_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(torch.nn.Conv2d(1, 1, 1), path)
    with pytest.raises(InputError, match=r"whole\.pth: .*a whole model; give .*state_dict"):
        load_checkpoint(path)


def test_a_graph_of_a_bundle_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"detector\.onnx: a graph of a bundle; give the folder"):
        load_checkpoint(default_bundle() / "detector.onnx")


def test_the_state_of_a_training_run_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"run": {}, "iteration": 3, "network": {}, "optimizer": {}}, path)
    with pytest.raises(InputError, match=r"unfinished training run; give the model\.pth"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [
        {"roi_heads.box_predictor.cls_score.bias": 3},
        {3: "roi_heads.box_predictor.cls_score.bias"},
        {"backbone.bottom_up.stem.conv1.weight": "text"},
        {"backbone.bottom_up.stem.conv1.weight": torch.tensor(1.0)},
    ],
)
def test_weights_of_another_type_or_shape_are_an_input_error(tmp_path: Path, state) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=r"other\.pth: not a") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_an_input_error(network, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    other = network_config("lite2-fpn", CONFIG.labels)
    save_model(path, other, network.state_dict(), {})
    with pytest.raises(InputError, match="not the weights of a lite2 network") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_name_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="maskrcnn_resnet50_fpn/COCO_V1"):
        load_checkpoint("resnet")


def test_a_network_of_other_classes_loads_the_weights_that_match(network, saved: Path) -> None:
    other = build_network(network_config("lite0-fpn", ("cat",)))
    missing = load_matching(other, load_checkpoint(saved)[1])
    assert sorted(missing) == [
        "roi_heads.box_predictor.bbox_pred.bias",
        "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.bias",
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
    ]
    name = "roi_heads.box_head.fc6.weight"
    assert torch.equal(other.state_dict()[name], network.state_dict()[name])


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    save_atomically({"iteration": 1}, path)
    with pytest.raises(TypeError, match="pickle"):
        save_atomically({"iteration": (i for i in range(2))}, path)
    assert read_state(path) == {"iteration": 1}
    assert list(tmp_path.iterdir()) == [path], "no part of the new one stays"
