"""Bundle writer: puts a bundle's folder in place only when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from maskcast.engines.bundle import MANIFEST, Manifest
from maskcast.engines.errors import InputError


def check_bundle_folder(out: Path) -> None:
    """Refuse to write to a folder that holds anything but a bundle.

    Raises:
        InputError: the folder holds something else.
    """
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (out / MANIFEST).is_file() and not is_empty:
        raise InputError(f"{out}: exists and is not a bundle; give another folder")


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """Yield an empty folder to write a bundle to; at the end it replaces ``out``.

    Raises:
        InputError: ``out`` cannot be written.
    """
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield folder
        folder.chmod(0o755)
        _put_in_place(folder, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a bundle's manifest."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST).write_bytes(content + b"\n")


def _put_in_place(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    # Folders cannot be swapped in one step: move the old one away, and back if the new one fails.
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    out.rename(old / out.name)
    try:
        folder.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
