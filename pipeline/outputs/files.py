"""Output files: their names, checks before a run, and temporary names until the first frame."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from maskcast.engines.errors import InputError

SEGMENT_TIME = "-%Y%m%d-%H%M%S"
"""Added to the name of segments if it does not contain a time."""

_PROBE_BYTES = 65536

_DIRECTIVE = re.compile(r"%[A-Za-z]")


class FileNames:
    """The names of one output's files.

    The first source is written to ``path``; the names of the other sources are added to theirs
    (``out-door.mp4``). ``path`` may contain ``strftime`` directives, which are replaced by the
    local time of the file's first frame. Only the first file of a source in ``sources`` may replace
    an existing file, and only if its name contains no time. All others get a number
    (``out-2.mp4``) if their name is taken.

    Args:
        path: the output's path.
        sources: the names of the run's sources, in their order. If empty, the first source is the
            first one that ``next`` is called with.
        segmented: whether a source has several files; the time is then added to a name without one.
    """

    def __init__(self, path: Path, sources: Sequence[str] = (), *, segmented: bool = False) -> None:
        is_dated = is_pattern(path)
        self._pattern = (
            path.with_stem(path.stem + SEGMENT_TIME) if segmented and not is_dated else path
        )
        self._is_dated = segmented or is_dated
        self._first = sources[0] if sources else None
        self._may_replace = set(sources)
        self._is_open = not sources

    def next(self, source: str, time_ns: int) -> PendingFile:
        """Return the next file of a source whose first frame was captured at ``time_ns`` (UTC)."""
        if self._is_open:
            self._is_open = False
            self._first, self._may_replace = source, {source}
        path = self._pattern
        if self._is_dated:
            path = expand(path, time_ns)
        if source != self._first:
            path = path.with_stem(f"{path.stem}-{source}")
        replace = not self._is_dated and source in self._may_replace
        self._may_replace.discard(source)
        return PendingFile(path, replace=replace)


class PendingFile:
    """A file that has a temporary name until ``keep`` is called.

    Args:
        path: the final name; with ``replace``, links are followed.
        replace: whether ``keep`` replaces an existing file instead of adding a number to the name.

    Attributes:
        name: the final name, without a number.
        path: the current name.
        is_kept: whether the file has its final name.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.name = self._final = path.resolve() if replace else path
        self._replace = replace
        self.path = _part_path(self._final)
        self.is_kept = False

    def probe(self) -> None:
        """Create the empty file, and check that data can be written to it.

        Raises:
            OSError: the disk is full, the folder is gone, or permission is denied.
        """
        try:
            with self.path.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                file.truncate(0)
        except OSError:
            self.discard()
            raise

    def keep(self) -> None:
        """Give the file its final name, atomically.

        Raises:
            OSError: the folder is gone or cannot be written.
        """
        final = self._final if self._replace else _claim(self._final)
        self.path.replace(final)
        self.path, self.is_kept = final, True

    def discard(self) -> None:
        """Delete the file, unless it was kept."""
        if not self.is_kept:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def is_pattern(path: Path) -> bool:
    """Return whether a path contains a ``strftime`` directive."""
    return _DIRECTIVE.search(str(path)) is not None


def expand(path: Path, time_ns: int) -> Path:
    """Insert a time, UTC nanoseconds, into a pattern as local time, and create its folders.

    Raises:
        OSError: a folder cannot be created.
    """
    local_time = datetime.fromtimestamp(time_ns / 1e9).astimezone()  # with its time zone, for %z
    expanded = Path(local_time.strftime(str(path)))
    if expanded.parent != path.parent:  # %D in a file name also adds folders
        expanded.parent.mkdir(parents=True, exist_ok=True)
    return expanded


def check_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return the path given as argument ``name``.

    Raises:
        TypeError: it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    return Path(path)


def check_label_names(label_names: Sequence[str]) -> tuple[str, ...]:
    """Return class names as a tuple.

    Raises:
        TypeError: they are not a sequence of strings.
    """
    names = () if isinstance(label_names, str) else tuple(label_names)
    if isinstance(label_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError("label_names: expected a sequence of class names, as Manifest.labels is")
    return names


def check_writable(path: Path) -> None:
    """Reject a file that certainly cannot be written, without touching it.

    Raises:
        InputError: its folder does not exist or is read-only, the path is a folder, or a name in it
            is too long.
    """
    try:
        problem = _writing_problem(path)
    except OSError as error:  # a name in it is too long
        problem = error.strerror or str(error)
    if problem:
        raise InputError(f"{path}: cannot be written: {problem}")


def _writing_problem(path: Path) -> str:
    folder = path.parent
    while is_pattern(folder):
        folder = folder.parent
    if path.is_dir():
        return "it is a folder; add a file name"
    if not folder.is_dir():
        return f"no such folder: {folder}; create it first"
    _part_path(path).exists()  # raises if the name is too long
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        return "permission denied"
    return ""


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """Reject an output that is one of the inputs, also through a link or a hard link.

    Args:
        path: the output.
        inputs: files, and folders whose files are read.

    Raises:
        InputError: the output is one of the inputs.
    """
    for given in inputs:
        if path.resolve() == given.resolve() or _is_same(path, given):
            raise InputError(
                f"{path}: cannot be written: it is the input {given}; choose another name"
            )


def _is_same(path: Path, given: Path) -> bool:
    try:
        status = path.stat()
        files = given.iterdir() if given.is_dir() else [given]
        return any(os.path.samestat(status, file.stat()) for file in files if file.exists())
    except OSError:
        return False  # at least one of them does not exist


def _part_path(path: Path) -> Path:
    """Return the temporary name of a file."""
    return path.with_name(f".{path.name}.part")


def _claim(path: Path) -> Path:
    """Reserve the first free name of ``out.mp4``, ``out-2.mp4``, … with an empty file."""
    for number in count(1):
        free = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            free.open("xb").close()
        except FileExistsError:
            continue
        return free
    raise AssertionError
