import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from maskcast.builder.checkpoint.checkpoint import load_checkpoint, load_network
from maskcast.builder.network.network import ExactAnchorGenerator
from maskcast.engines.errors import InputError

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def zoo_state(depth: int = 50, classes: int = 80, with_masks: bool = True):
    """Weights of the layout of detectron2's R_50/R_101 FPN files, all different."""
    rng = np.random.default_rng(0)
    state: OrderedDict[str, np.ndarray] = OrderedDict()

    def array(name: str, *shape: int) -> None:
        state[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def convolution(name: str, outputs: int, inputs: int, size: int) -> None:
        array(f"{name}.weight", outputs, inputs, size, size)
        for kind in ("weight", "bias", "running_mean"):
            array(f"{name}.norm.{kind}", outputs)
        state[f"{name}.norm.running_var"] = np.ones(outputs, np.float32)

    def biased(name: str, outputs: int, *inputs: int) -> None:
        array(f"{name}.weight", outputs, *inputs)
        array(f"{name}.bias", outputs)

    convolution("backbone.bottom_up.stem.conv1", 64, 3, 7)
    inputs = 64
    for level, count in enumerate(BLOCKS[depth]):
        width = 64 << level
        for block in range(count):
            name = f"backbone.bottom_up.res{level + 2}.{block}"
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, inputs, 1)
            convolution(f"{name}.conv1", width, inputs, 1)
            convolution(f"{name}.conv2", width, width, 3)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            inputs = 4 * width
        biased(f"backbone.fpn_lateral{level + 2}", 256, inputs, 1, 1)
        biased(f"backbone.fpn_output{level + 2}", 256, 256, 3, 3)
    rpn = "proposal_generator.rpn_head"
    biased(f"{rpn}.conv", 256, 256, 3, 3)
    biased(f"{rpn}.objectness_logits", 3, 256, 1, 1)
    biased(f"{rpn}.anchor_deltas", 12, 256, 1, 1)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    biased("roi_heads.box_head.fc1", 1024, 256 * 49)
    biased("roi_heads.box_head.fc2", 1024, 1024)
    biased("roi_heads.box_predictor.cls_score", classes + 1, 1024)
    biased("roi_heads.box_predictor.bbox_pred", 4 * classes, 1024)
    if with_masks:
        for layer in range(1, 5):
            biased(f"roi_heads.mask_head.mask_fcn{layer}", 256, 256, 3, 3)
        array("roi_heads.mask_head.deconv.weight", 256, 256, 2, 2)
        array("roi_heads.mask_head.deconv.bias", 256)
        biased("roi_heads.mask_head.predictor", classes, 256, 1, 1)
    return state


def write(path: Path, content, protocol: int = 2) -> Path:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol)
    return path


@pytest.fixture(scope="module")
def state():
    return zoo_state()


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_zoo_file_loads_completely(state, tmp_path: Path, protocol: int) -> None:
    content = {"model": state, "__author__": "Detectron2 Model Zoo"}
    config, loaded = load_checkpoint(write(tmp_path / "model.pkl", content, protocol))
    assert len(config.labels) == 80
    assert config.labels[0] == "person"
    assert config.labels[-1] == "toothbrush"
    pairs = {
        "backbone.body.layer3.5.conv2.weight": "backbone.bottom_up.res4.5.conv2.weight",
        "backbone.body.layer1.0.downsample.1.bias": "backbone.bottom_up.res2.0.shortcut.norm.bias",
        "backbone.fpn.inner_blocks.3.0.weight": "backbone.fpn_lateral5.weight",
        "backbone.fpn.layer_blocks.0.0.bias": "backbone.fpn_output2.bias",
        "rpn.head.bbox_pred.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
        "roi_heads.box_head.fc6.weight": "roi_heads.box_head.fc1.weight",
        "roi_heads.mask_head.3.0.weight": "roi_heads.mask_head.mask_fcn4.weight",
        "roi_heads.mask_predictor.conv5_mask.weight": "roi_heads.mask_head.deconv.weight",
    }
    for ours, theirs in pairs.items():
        assert np.array_equal(loaded[ours].numpy(), state[theirs]), ours


def test_colours_and_the_background_change_places(state, tmp_path: Path) -> None:
    _, loaded = load_checkpoint(write(tmp_path / "model.pkl", {"model": state}))
    stem = state["backbone.bottom_up.stem.conv1.weight"]
    assert np.array_equal(loaded["backbone.body.conv1.weight"].numpy(), stem[:, ::-1])
    scores = state["roi_heads.box_predictor.cls_score.weight"]
    found = loaded["roi_heads.box_predictor.cls_score.weight"].numpy()
    assert np.array_equal(found[0], scores[80])
    assert np.array_equal(found[1:], scores[:80])
    boxes = loaded["roi_heads.box_predictor.bbox_pred.weight"].numpy()
    assert boxes.shape == (324, 1024)
    assert np.array_equal(boxes[4:], state["roi_heads.box_predictor.bbox_pred.weight"])
    masks = loaded["roi_heads.mask_predictor.mask_fcn_logits.bias"].numpy()
    assert np.array_equal(masks[1:], state["roi_heads.mask_head.predictor.bias"])


def test_what_differs_from_torchvision_is_in_the_configuration(state, tmp_path: Path) -> None:
    config, network = load_network(write(tmp_path / "model.pkl", {"model": state}))
    assert config.roi_align_aligned
    assert config.stride_in_1x1
    assert config.image_mean == pytest.approx((123.675 / 255, 116.28 / 255, 103.53 / 255))
    assert config.image_std == pytest.approx((1 / 255,) * 3)
    assert isinstance(network.rpn.anchor_generator, ExactAnchorGenerator)
    network.transform.min_size, network.transform.max_size = (64,), 64
    with torch.inference_mode():
        assert set(network([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_pixel_statistics_of_the_file_go_before_the_usual_ones(state, tmp_path: Path) -> None:
    content = OrderedDict(state)
    content["pixel_mean"] = np.array([10.2, 20.4, 30.6], np.float32).reshape(3, 1, 1)
    content["pixel_std"] = np.array([51.0, 51.0, 25.5], np.float32).reshape(3, 1, 1)
    config, _ = load_checkpoint(write(tmp_path / "model.pkl", {"model": content}))
    assert config.image_mean == pytest.approx((0.12, 0.08, 0.04))
    assert config.image_std == pytest.approx((0.1, 0.2, 0.2))


def test_a_resnet101_without_masks_and_with_own_classes_is_recognised(tmp_path: Path) -> None:
    state = zoo_state(depth=101, classes=2, with_masks=False)
    config, _ = load_checkpoint(write(tmp_path / "model.pkl", {"model": state}))
    assert config.backbone == "resnet101"
    assert not config.with_masks
    assert config.labels == ("class 1", "class 2")


def test_a_detectron2_file_of_torch_is_recognised_too(state, tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"model": tensors, "iteration": 9}, path)
    assert load_checkpoint(path)[0].roi_align_aligned


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = write(tmp_path / "model.pkl", {"model": Malicious()})
    with pytest.raises(InputError, match="not part of an array") as caught:
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    assert "\n" not in str(caught.value)


def test_a_truncated_or_foreign_file_is_an_input_error(state, tmp_path: Path) -> None:
    path = write(tmp_path / "model.pkl", {"model": state})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="not a checkpoint of arrays"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pkl")
    write(path, {"model": {"backbone.bottom_up.x": np.zeros(1)}})
    with pytest.raises(InputError, match="not a ResNet-FPN R-CNN"):
        load_checkpoint(path)
