"""Keys of clients with their rights, as ``maskcast keys`` writes them."""

import shutil
from pathlib import Path

from maskcast.pipeline.wire.curve import new_keys
from maskcast.pipeline.wire.rights import ClientRights, write_rights


def new_client(path: Path, *sources: str, control: bool = False) -> Path:
    """Make the keys of a client that may see these sources, all of them if none is named."""
    path.parent.mkdir(exist_ok=True)
    key, _ = new_keys(path)
    allow(key, *sources, control=control)
    return path


def allow(key: Path | str, *sources: str, control: bool = False) -> None:
    write_rights(key, ClientRights(sources=sources or ("*",), control=control))


def admit(key: Path | str, folder: Path, *sources: str, control: bool = False) -> None:
    """Put a client's key into a folder; its rights come first, as a key without any is refused."""
    target = folder / Path(key).name
    allow(target, *sources, control=control)
    shutil.copy(key, target)
