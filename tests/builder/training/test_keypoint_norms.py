import pytest
import torch

from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.keypoint_norms import add_norms, fold_norms
from maskcast.engines.instances.keypoints import COCO_PERSON


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = network_config("lite0-fpn", ("person",), with_masks=False, keypoints=COCO_PERSON)
    return build_network(config)


def test_norms_leave_the_first_batch_of_a_trained_branch_as_it_is(network) -> None:
    head = network.roi_heads.keypoint_head.train()
    first, second = torch.rand(6, 128, 14, 14), torch.rand(6, 128, 14, 14) * 5
    with torch.no_grad():
        before, other = head(first), head(second)
        add_norms(head)
        torch.testing.assert_close(head(first), before, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(head(second), other, rtol=0.1)


def test_a_folded_state_is_that_of_the_network_without_norms_and_computes_the_same(network) -> None:
    names = list(network.state_dict())
    head = network.roi_heads.keypoint_head.train()
    add_norms(head)
    with torch.no_grad():
        for _ in range(3):
            head(torch.randn(4, 128, 14, 14))
            for parameter in head.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    pooled = torch.randn(2, 128, 14, 14)
    folded = build_network(
        network_config("lite0-fpn", ("person",), with_masks=False, keypoints=COCO_PERSON)
    )
    state = fold_norms(network.state_dict())
    assert list(state) == names
    folded.load_state_dict(state)
    with torch.no_grad():
        expected = head.eval()(pooled)
        found = folded.eval().roi_heads.keypoint_head(pooled)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_state_without_norms_stays_as_it_is(network) -> None:
    state = network.state_dict()
    assert fold_norms(state) == state
