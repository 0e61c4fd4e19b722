import pytest
import torch
from torchvision.models.detection.roi_heads import keypointrcnn_loss
from torchvision.ops import box_iou

from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training import losses
from maskcast.builder.training.losses import compute_keypoint_loss, compute_losses
from maskcast.engines.instances.keypoints import COCO_PERSON


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(network_config("lite0-fpn", ("person",))).train()


def target(with_masks: bool) -> dict[str, torch.Tensor]:
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 10:50, 20:60] = 1
    boxes = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    return {**boxes, "masks": masks} if with_masks else boxes


def test_the_losses_are_those_of_torchvisions_own_forward(network) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    targets = [target(True), target(True)]
    network.transform.min_size, network.transform.max_size = (64,), 96
    torch.manual_seed(1)
    theirs = network(images, targets)
    torch.manual_seed(1)
    ours = compute_losses(network, images, targets)
    for name, their_name in {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "box_class": "loss_classifier",
        "box_regression": "loss_box_reg",
        "mask": "loss_mask",
    }.items():
        torch.testing.assert_close(ours[name], theirs[their_name], rtol=1e-4, atol=1e-5)


def test_a_limited_number_of_positive_regions_per_image_trains_the_branches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = build_network(network_config("lite0-fpn", ("person",), keypoints=COCO_PERSON)).train()
    counts = []
    pool = losses._pool

    def counted(pooler, features, rois, positives, batch):
        counts.append([int(positive.sum()) for positive in positives.values()])
        return pool(pooler, features, rois, positives, batch)

    monkeypatch.setattr(losses, "_pool", counted)
    images = [torch.rand(3, 64, 96)] * 2
    targets = [{**target(True), **pose()}, {**target(True), **pose()}]
    for limit in (None, 2, 1000):
        torch.manual_seed(1)
        compute_losses(network, images, targets, limit)
    all_of_them = counts[0]
    assert min(all_of_them) > 2
    of_poses = [1, 1]  # under a limit, keypoints are learned near the instances' own boxes
    assert counts == [all_of_them] * 2 + [[2, 2], of_poses, all_of_them, of_poses]


def test_each_positive_region_is_chosen_as_often_as_the_others() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([3, 0, 1, 2, 0])
    chosen = torch.stack([losses._sample(labels, 2) for _ in range(600)])
    assert set(chosen.unique(dim=0).sum(1).tolist()) == {3, 4, 5}
    assert ((chosen > 0).sum(1) == 2).all()
    assert (chosen[:, [1, 4]] == 0).all()
    shares = (chosen > 0).float().mean(0)[[0, 2, 3]]
    torch.testing.assert_close(shares, torch.full((3,), 2 / 3), atol=0.08, rtol=0)


def test_each_instance_trains_the_mask_of_its_own_class() -> None:
    torch.manual_seed(0)
    network = build_network(network_config("lite0-fpn", ("person", "dog", "car"))).train()
    # A mask that depends on the class, so that another class's would show.
    torch.nn.init.normal_(network.roi_heads.mask_predictor.mask_fcn_logits.weight)
    masks = torch.zeros(3, 64, 96, dtype=torch.uint8)
    for i in range(3):
        masks[i, 10 + 10 * i : 50, 30 * i : 30 * i + 28] = 1
    boxes = [[30.0 * i, 10.0 + 10 * i, 30.0 * i + 28, 50.0] for i in range(3)]
    targets = [{"boxes": torch.tensor(boxes), "labels": torch.tensor([3, 1, 2]), "masks": masks}]
    images = [torch.rand(3, 64, 96)]
    network.transform.min_size, network.transform.max_size = (64,), 96
    torch.manual_seed(1)
    theirs = network(images, targets)
    torch.manual_seed(1)
    ours = compute_losses(network, images, targets)
    torch.testing.assert_close(ours["mask"], theirs["loss_mask"], rtol=1e-4, atol=1e-5)


def test_an_instance_with_an_empty_mask_does_not_train_the_mask_branch(network) -> None:
    with_one = target(True)
    with_two = {
        "boxes": torch.cat([with_one["boxes"], torch.tensor([[60.0, 5.0, 90.0, 40.0]])]),
        "labels": torch.tensor([1, 1]),
        "masks": torch.cat([with_one["masks"], torch.zeros(1, 64, 96, dtype=torch.uint8)]),
    }
    image = torch.rand(3, 64, 96)
    without_mask = {**with_one, "masks": torch.zeros(1, 64, 96, dtype=torch.uint8)}
    assert compute_losses(network, [image], [without_mask])["mask"].item() == 0
    losses = compute_losses(network, [image], [with_two])
    assert losses["mask"].item() == pytest.approx(0.693, abs=0.05)


def test_an_image_with_boxes_alone_trains_all_but_the_mask_branch(network) -> None:
    network.zero_grad()
    losses = compute_losses(network, [torch.rand(3, 64, 96)], [target(False)])
    assert losses["mask"].item() == 0
    sum(losses.values()).backward()
    assert network.rpn.head.cls_logits.weight.grad.abs().sum() > 0
    assert network.roi_heads.box_predictor.bbox_pred.weight.grad.abs().sum() > 0
    assert network.roi_heads.mask_predictor.mask_fcn_logits.weight.grad is None


def test_in_a_mixed_batch_the_mask_loss_is_that_of_the_images_with_masks(network) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    losses = compute_losses(network, images, [target(False), target(True)])
    # The first logits are near 0: the cross-entropy of a probability of one half.
    assert losses["mask"].item() == pytest.approx(0.693, abs=0.05)


def test_images_of_different_sizes_make_one_batch(network) -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty["masks"] = torch.zeros(0, 40, 70, dtype=torch.uint8)
    images = [torch.rand(3, 64, 96), torch.rand(3, 40, 70)]
    losses = compute_losses(network, images, [target(True), empty])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_batch_of_background_alone_has_no_box_and_no_mask_loss(network) -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = compute_losses(network, [torch.rand(3, 64, 96)], [empty])
    assert losses["box_regression"].item() == 0
    assert losses["mask"].item() == 0
    assert losses["rpn_objectness"].item() > 0


@pytest.fixture(scope="module")
def posing():
    torch.manual_seed(0)
    config = network_config("lite0-fpn", ("person",), with_masks=False, keypoints=COCO_PERSON)
    network = build_network(config).train()
    torch.nn.init.normal_(network.roi_heads.keypoint_predictor.kps_score_lowres.weight)
    network.transform.min_size, network.transform.max_size = (64,), 96
    return network


def pose(known: bool = True) -> dict[str, torch.Tensor]:
    x, y = torch.linspace(25, 55, 17), torch.linspace(45, 15, 17)
    visibility = torch.tensor([2.0, 1.0, 0.0] * 6)[:17] * known
    return {**target(False), "keypoints": torch.stack([x, y, visibility], 1)[None]}


def test_the_keypoint_loss_is_that_of_torchvisions_own_forward(posing) -> None:
    images, targets = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)], [pose(), pose()]
    torch.manual_seed(1)
    theirs = posing(images, targets)
    torch.manual_seed(1)
    ours = compute_losses(posing, images, targets)
    assert theirs["loss_keypoint"] > 1
    torch.testing.assert_close(ours["keypoint"], theirs["loss_keypoint"], rtol=1e-4, atol=1e-5)
    assert set(ours) == {"rpn_objectness", "rpn_box", "box_class", "box_regression", "keypoint"}


def test_instances_without_known_keypoints_do_not_train_the_keypoint_branch(posing) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    assert compute_losses(posing, images, [pose(False), target(False)])["keypoint"].item() == 0
    torch.manual_seed(1)
    alone = compute_losses(posing, images[:1], [pose()])["keypoint"]
    torch.manual_seed(1)
    mixed = compute_losses(posing, images, [pose(), pose(False)])["keypoint"]
    torch.testing.assert_close(mixed, alone, rtol=0.2, atol=0.2)


def test_the_keypoint_branch_alone_gets_gradients_from_its_own_loss(posing) -> None:
    posing.zero_grad()
    network = posing.eval()
    losses = compute_keypoint_loss(network, [torch.rand(3, 64, 96)], [pose()])
    posing.train()
    losses["keypoint"].backward()
    assert set(losses) == {"keypoint"}
    trained = {name for name, value in posing.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in posing.named_parameters() if ".keypoint_" in name}


def test_the_boxes_of_the_keypoint_loss_lie_near_the_instance_and_in_the_image() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [0.0, 0.0, 96.0, 64.0]]).repeat(500, 1)
    moved = losses._jitter(boxes, (64, 96))
    assert (moved >= 0).all()
    assert (moved <= torch.tensor([96, 64, 96, 64])).all()
    overlaps = box_iou(moved[::2], boxes[:1])
    assert 0.75 < overlaps.mean() < 0.9
    assert overlaps.std() > 0.03


def test_a_batch_without_known_keypoints_leaves_the_branch_as_it_is(posing) -> None:
    posing.zero_grad()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty["keypoints"] = torch.zeros(0, 17, 3)
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    found = compute_keypoint_loss(posing.eval(), images, [pose(False), empty])
    posing.train()
    found["keypoint"].backward()
    assert found["keypoint"].item() == 0
    assert not posing.roi_heads.keypoint_predictor.kps_score_lowres.bias.grad.any()


def test_a_narrow_target_at_a_cells_middle_gives_the_loss_of_one_cell() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 17, 56, 56)
    box = torch.tensor([[10.0, 20.0, 66.0, 76.0]])  # a cell is a pixel
    points = torch.tensor([[[10.5 + i, 30.5 + i, 2.0] for i in range(17)]])
    one_cell = keypointrcnn_loss(logits, [box], [points], [torch.tensor([0])])
    found = losses._spread_loss(logits, box, points, spread=0.05)
    torch.testing.assert_close(found, one_cell)


def test_a_wide_target_prefers_near_cells_to_far_ones() -> None:
    box = torch.tensor([[0.0, 0.0, 56.0, 56.0]])
    point = torch.tensor([[[28.5, 28.5, 2.0]]])

    def loss(x: int, y: int) -> float:
        logits = torch.zeros(1, 1, 56, 56)
        logits[0, 0, y, x] = 5
        return losses._spread_loss(logits, box, point, spread=1.5).item()

    assert loss(28, 28) < loss(29, 28) < loss(31, 28) < loss(40, 28)
    assert loss(29, 28) == pytest.approx(loss(27, 28)) == pytest.approx(loss(28, 29))


def test_points_that_are_unknown_or_outside_of_the_box_have_no_part_in_a_wide_loss() -> None:
    torch.manual_seed(3)
    logits = torch.randn(1, 3, 56, 56)
    box = torch.tensor([[0.0, 0.0, 112.0, 112.0]])
    points = torch.tensor([[[50.0, 60.0, 2.0], [50.0, 60.0, 0.0], [113.0, 60.0, 2.0]]])
    found = losses._spread_loss(logits, box, points, 1.5)
    torch.testing.assert_close(found, losses._spread_loss(logits[:, :1], box, points[:, :1], 1.5))
    assert losses._spread_loss(logits[:, 1:], box, points[:, 1:], 1.5) == 0
