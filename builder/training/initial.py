"""Initial model: the checkpoint or bundle from whose weights a training run starts."""

from pathlib import Path
from typing import NamedTuple

import msgspec
from torch import Tensor

from maskcast.builder.checkpoint.checkpoint import load_bundle_weights, load_checkpoint
from maskcast.builder.network.network import NetworkConfig, build_network, network_config
from maskcast.engines.bundle import is_bundle, open_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import Keypoints


class InitialModel(NamedTuple):
    """A network's configuration and its state."""

    config: NetworkConfig
    state: dict[str, Tensor]

    def adapt(
        self, labels: tuple[str, ...], with_masks: bool, keypoints: Keypoints | None
    ) -> NetworkConfig:
        """Return the configuration of the same network for the classes and keypoints of a run."""
        return msgspec.structs.replace(
            self.config, labels=labels, with_masks=with_masks, keypoints=keypoints
        )


def read_initial(source: Path, preset: str) -> InitialModel:
    """Read the model from which a run starts.

    Args:
        source: checkpoint or bundle.
        preset: network of the run; it sets the size of the keypoint branch if the model has none.

    Raises:
        InputError: the model cannot be read, or is of another network.
    """
    wanted = network_config(preset, ())
    if is_bundle(source):
        bundle = open_bundle(source)
        config = msgspec.structs.replace(
            wanted,
            labels=bundle.manifest.labels[1:],
            with_masks=bundle.segmenter is not None,
            keypoints=bundle.manifest.keypoints,
        )
        network = build_network(config)
        load_bundle_weights(network, bundle)
        return InitialModel(config, network.state_dict())
    config, state = load_checkpoint(source)
    if (config.backbone, config.heads) != (wanted.backbone, wanted.heads):
        raise InputError(
            f"{source}: a {config.backbone} network with {config.heads} heads, not {preset}; "
            "choose its preset with --network"
        )
    if config.keypoints is None:
        config = msgspec.structs.replace(
            config,
            keypoint_head_channels=wanted.keypoint_head_channels,
            keypoint_head_layers=wanted.keypoint_head_layers,
            keypoint_blur_cells=wanted.keypoint_blur_cells,
        )
    return InitialModel(config, state)
