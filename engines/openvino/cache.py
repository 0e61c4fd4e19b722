"""GraphCache: compiled graphs in the user's cache folder, so that a later start only loads them.

One file holds the graphs of one input shape. Processes that start at the same time do not wait for
one another: a file is written under a temporary name and then renamed, so that a reader finds a
complete file or none.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from maskcast.engines.user_cache import user_cache, write_atomically

LIMIT_BYTES = 1 << 30
"""Maximum size of the folder; the least recently used entries are deleted."""

_ABANDONED_S = 3600.0
"""A temporary file older than this belongs to a process that has ended."""
_SUFFIX, _PENDING_SUFFIX = ".graphs", ".pending"
_DIGEST_BYTES = hashlib.sha256().digest_size
_CPU_INFO = Path("/proc/cpuinfo")
# The lines that identify the model of a processor, x86 or ARM: no clock rates, no serial numbers.
_CPU_KIND = re.compile(
    r"^(?:vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+)\s*:.*$", re.M
)


class _Array(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Entry(msgspec.Struct):
    """The compiled graphs of one input shape; a loaded entry is a view of its file.

    Attributes:
        graphs: by name, the parts of each as OpenVINO exported them, with their precision.
        arrays: what the graphs compute for the test image, see ``outputs``.
    """

    graphs: dict[str, list[tuple[str, memoryview]]]
    arrays: dict[str, _Array]

    @classmethod
    def make(
        cls,
        graphs: Mapping[str, Sequence[tuple[str, memoryview]]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> Entry:
        """Make an entry from exported graphs and their outputs for the test image."""
        arrays = {
            name: _Array(array.dtype.str, array.shape, memoryview(array.tobytes()))
            for name, array in outputs.items()
        }
        return cls({name: list(parts) for name, parts in graphs.items()}, arrays)

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        """What the graphs compute for the test image, by the output's name."""
        return {
            name: np.frombuffer(array.data, array.dtype).reshape(array.shape)
            for name, array in self.arrays.items()
        }

    def release_pages(self) -> None:
        """Release the memory of a loaded entry; a later access reads the file again."""
        views = [data for parts in self.graphs.values() for _, data in parts]
        if views and isinstance(views[0].obj, mmap.mmap):
            views[0].obj.madvise(mmap.MADV_DONTNEED)


class DamagedEntryError(Exception):
    """The content of a cache file is not what was written."""


class GraphCache:
    """The compiled graphs of one model, by input shape.

    Args:
        model: what the compiled graphs depend on besides the input's shape, see ``describe``.
        folder: where the files are, as ``cache_folder`` returns it; None to store nothing.
    """

    def __init__(self, model: str, folder: Path | None) -> None:
        self._model = model
        self._folder = folder

    def has_entries(self) -> bool:
        """Return whether graphs of the model are stored, for any input shape."""
        if self._folder is None:
            return False
        return any(self._folder.glob(f"{self._model}-*{_SUFFIX}"))

    def load(self, size: tuple[int, int]) -> Entry | None:
        """Read the graphs for an input's height and width; None if there are none.

        Raises:
            DamagedEntryError: there is a file, but it is not what was written.
        """
        if (path := self._path(size)) is None:
            return None
        try:
            with path.open("rb") as file:
                # Nothing is written to the mapping, but OpenVINO accepts no read-only tensors.
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except OSError:
            return None
        except ValueError:
            raise DamagedEntryError("it is empty") from None
        digest, packed = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(packed).digest() != digest:
            raise DamagedEntryError("its checksum differs")
        with suppress(OSError):
            os.utime(path)  # marks the entry as recently used
        return msgspec.msgpack.decode(packed, type=Entry)

    def store(self, size: tuple[int, int], entry: Entry) -> bool:
        """Write the graphs for an input's height and width; delete what exceeds the limit.

        Returns:
            Whether they are stored: the folder may be read-only or the disk full.
        """
        if (path := self._path(size)) is None:
            return False
        packed = msgspec.msgpack.encode(entry)
        if len(packed) > LIMIT_BYTES:
            return False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            digest = hashlib.sha256(packed).digest()
            write_atomically(path, digest, packed, suffix=_PENDING_SUFFIX)
            _delete_old(path.parent, keep=path)
        except OSError:
            return False
        return True

    def _path(self, size: tuple[int, int]) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{self._model}-{size[0]}x{size[1]}{_SUFFIX}"


def cache_folder() -> Path | None:
    """Return the folder of the user's compiled graphs; None if the user has no home."""
    folder = user_cache()
    return None if folder is None else folder / "openvino"


def describe(graphs: Sequence[Path], *details: object) -> str:
    """Return a digest of everything that compiled graphs depend on, except the input's shape.

    Args:
        graphs: the portable graphs, whose content counts.
        details: how they are compiled: OpenVINO's version, precision, threads.

    Raises:
        OSError: a graph cannot be read.
    """
    digest = hashlib.sha256()
    for part in (_code_digest(), _cpu_kind(), *map(repr, details)):
        digest.update(f"{len(part)}:{part}".encode())
    for path in graphs:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


@functools.cache
def _code_digest() -> str:
    """Digest this package's code, which rewrites the graphs before they are compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _cpu_kind() -> str:
    """Describe the first processor; "" if the system gives no description."""
    try:
        first, _, _ = _CPU_INFO.read_text().partition("\n\n")
    except OSError:
        return ""
    return "\n".join(_CPU_KIND.findall(first))


def _delete_old(folder: Path, keep: Path) -> None:
    """Delete the least recently used entries until the folder is within its limit."""
    abandoned_s = time.time() - _ABANDONED_S
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process may have deleted it
            status = path.stat()
            if path.suffix == _PENDING_SUFFIX and status.st_mtime < abandoned_s:
                path.unlink()
            elif path.suffix == _SUFFIX and path != keep:
                found.append((status.st_mtime, status.st_size, path))
    left_bytes = LIMIT_BYTES - keep.stat().st_size
    for _, size_bytes, path in sorted(found, reverse=True):
        left_bytes -= size_bytes
        if left_bytes < 0:
            path.unlink(missing_ok=True)
