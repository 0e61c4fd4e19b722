"""Checkpoints: weights on disk together with the configuration of their network."""

import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from builder.network import NetworkConfig
from engines.errors import InputError

FORMAT = 1


def save_model(
    path: Path, config: NetworkConfig, state: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Writes a model of ours: tensors and builtins only."""
    content = {
        "format": FORMAT,
        "network": msgspec.to_builtins(config),
        "labels": list(config.labels),
        "model": {key: value.contiguous() for key, value in state.items()},
        "training": training,
    }
    write_atomically(content, path)


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that the old one stays until the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file of `torch.save`, executing nothing.

    Raises:
        InputError: it is missing, truncated, or holds more than tensors and builtins.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "truncated"
        raise InputError(f"{path}: not a checkpoint of tensors ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint, it holds a {type(content).__name__}")
    return content


def load_matching(network: Any, path: Path) -> list[str]:
    """Loads the weights whose shape fits; returns a line about each that does not."""
    state = read_state(path)
    state = state.get("model", state)
    own = network.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    return [f"not loaded: {key}" for key in own if key not in fitting]
