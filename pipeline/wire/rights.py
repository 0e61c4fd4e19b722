"""ClientRights: what a client may see and do, read from a file next to its key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from maskcast.engines.errors import InputError
from maskcast.pipeline.wire.message import VERSION, topic

SUFFIX = ".yaml"
"""``alice.yaml`` holds the rights of ``alice.key``."""

MAX_BYTES = 64 << 10
"""Longest file that is read."""

_PATTERN = r"\A(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63}\*?)\Z"
Pattern = Annotated[str, Meta(pattern=_PATTERN)]
"""A source's name, or the beginning of names and ``*``."""


class ClientRights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client may see and do. What is not listed is not granted.

    Attributes:
        sources: names of the sources that it may see; ``yard*`` is every name that begins with
            ``yard``, ``*`` is every name.
        control: whether it may add, remove and list these sources, where there is a control
            endpoint that allows its key.
    """

    sources: Annotated[tuple[Pattern, ...], Meta(max_length=1024)] = ()
    control: bool = False

    def allows(self, source: str) -> bool:
        """Whether a source may be seen."""
        return topic(source, "event").startswith(_prefixes(self.sources))

    def granted(self, subscription: bytes) -> list[bytes]:
        """Return the part of a subscription that is granted, as subscriptions that do not overlap.

        Args:
            subscription: a prefix of topics; ``b""`` covers all of them.
        """
        prefixes = _prefixes(self.sources)
        if subscription.startswith(prefixes):
            return [subscription]
        return [prefix for prefix in prefixes if prefix.startswith(subscription)]


@lru_cache(maxsize=1024)
def _prefixes(sources: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return the prefixes of the topics of these sources; none is the beginning of another."""
    prefixes: list[bytes] = []
    for prefix in sorted(
        f"{VERSION}/{name[:-1] if name.endswith('*') else name + '/'}".encode() for name in sources
    ):
        if not prefixes or not prefix.startswith(prefixes[-1]):
            prefixes.append(prefix)
    return tuple(prefixes)


EVERYTHING = ClientRights(sources=("*",), control=True)


def rights_path(key: str | Path) -> Path:
    """Return the file that holds the rights of a ``.key`` file's owner."""
    return Path(key).with_suffix(SUFFIX)


def read_rights(key: str | Path) -> ClientRights:
    """Read the rights that belong to a ``.key`` file.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = rights_path(key)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            f"{key} has no rights file: run maskcast keys allow {key} --sources 'door,yard*' "
            "(or '*' for all)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read the rights in {path}: {error.strerror}") from None
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes")
        rights: ClientRights = msgspec.yaml.decode(text, type=ClientRights)
    except (msgspec.MsgspecError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: {reason}; write `sources: [door, yard*]` and `control: false`"
        ) from None
    return rights


def make_rights(sources: Sequence[str], *, control: bool) -> ClientRights:
    """Make rights from values that a user gave.

    Raises:
        InputError: a name is invalid.
    """
    try:
        return msgspec.convert({"sources": sources, "control": control}, ClientRights)
    except msgspec.ValidationError:
        wrong = [name for name in sources if not re.fullmatch(_PATTERN, name)]
        raise InputError(
            f"{wrong[0]!r} is no source: use names, the beginning of names and *, or * for all"
            if wrong
            else f"{len(sources)} sources are too many; use the beginning of names and *"
        ) from None


def write_rights(key: str | Path, rights: ClientRights) -> Path:
    """Write the rights that belong to a ``.key`` file, and replace former ones at once.

    Returns:
        The file.

    Raises:
        InputError: it cannot be written.
    """
    path = rights_path(key)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(msgspec.yaml.encode(rights))
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    return path
