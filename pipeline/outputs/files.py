"""Output files: names, checks before a run, and a temporary name until the first frame."""

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
"""What segments without a time in their name get."""

_PROBE_BYTES = 65536

_DIRECTIVE = re.compile(r"%[A-Za-z]")


class FileNames:
    """The names of one output's files.

    The first source is written to ``path``, every other one to a name with its own name added
    (``out-door.mp4``). ``path`` may hold directives of ``strftime``, which become the local time of
    the file's first frame. Only the first file of a source in ``sources``, under a name without a
    time, may replace a file that exists; all others get a number (``out-2.mp4``) where their name
    is taken.

    Args:
        path: the output's path.
        sources: the names of the sources of the run, in their order; empty where they are not
            known: then the first source that is asked for is the first one.
        segmented: several files follow one another; the time is added to a name without one.
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
    """A file that is written under a temporary name until it is worth its own.

    Args:
        path: the name that it will have; where it is a link, the link's target is meant.
        replace: ``keep`` replaces a file of that name; else it takes the next free one.

    Attributes:
        name: the name that it will have, apart from a number.
        path: the name that the file has now.
        is_kept: whether it has its own.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.name = self._final = path.resolve() if replace else path
        self._replace = replace
        self.path = _part_path(self._final)
        self.is_kept = False

    def probe(self) -> None:
        """Make the file, empty, and find out whether anything can be written to it.

        Raises:
            OSError: disk full, folder gone, no permission.
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
        """Give the file its name, atomically.

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
    """Return whether a path holds a directive of ``strftime``."""
    return _DIRECTIVE.search(str(path)) is not None


def expand(path: Path, time_ns: int) -> Path:
    """Put a time (UTC nanoseconds) into a pattern, as local time; make the folders that it names.

    Raises:
        OSError: a folder cannot be made.
    """
    local_time = datetime.fromtimestamp(time_ns / 1e9).astimezone()  # knows its zone, for %z
    expanded = Path(local_time.strftime(str(path)))
    if expanded.parent != path.parent:  # %D in a name makes folders, too
        expanded.parent.mkdir(parents=True, exist_ok=True)
    return expanded


def check_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return a path; ``name`` is the argument's.

    Raises:
        TypeError: it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    return Path(path)


def check_label_names(label_names: Sequence[str]) -> tuple[str, ...]:
    """Return the model's class names.

    Raises:
        TypeError: they are not a sequence of strings.
    """
    names = () if isinstance(label_names, str) else tuple(label_names)
    if isinstance(label_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError("label_names: expected a sequence of class names, as Manifest.labels is")
    return names


def check_writable(path: Path) -> None:
    """Refuse a file that certainly cannot be written, without touching it.

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
        return f"No such file or directory: {folder}; create the folder first"
    _part_path(path).exists()  # raises if the name is too long
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        return "permission denied"
    return ""


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is one of the inputs: by its path, a link or a hard link.

    Args:
        path: the output.
        inputs: files, and folders whose files are read.

    Raises:
        InputError: it is one.
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
    """Return the name under which a file is written until it is worth its own."""
    return path.with_name(f".{path.name}.part")


def _claim(path: Path) -> Path:
    """Reserve the first free name of ``out.mp4``, ``out-2.mp4``, …; it becomes an empty file."""
    for number in count(1):
        free = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            free.open("xb").close()
        except FileExistsError:
            continue
        return free
    raise AssertionError
