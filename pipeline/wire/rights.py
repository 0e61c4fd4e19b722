"""ClientRights: which sources a client may see and control, read from a file next to its key."""

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
"""Suffix of rights files: ``alice.yaml`` contains the rights of ``alice.key``."""

MAX_BYTES = 64 << 10
"""Maximum length of a rights file."""

_PATTERN = r"\A(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63}\*?)\Z"
Pattern = Annotated[str, Meta(pattern=_PATTERN)]
"""The name of a source, or the beginning of names followed by ``*``."""


class ClientRights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rights of a client. Anything that is not listed is not allowed.

    Attributes:
        sources: names of the sources that it may see; ``yard*`` stands for all names that begin
            with ``yard``, and ``*`` for all names.
        control: whether it may add, remove and list these sources, through a control endpoint that
            allows its key.
    """

    sources: Annotated[tuple[Pattern, ...], Meta(max_length=1024)] = ()
    control: bool = False

    def allows(self, source: str) -> bool:
        """Return whether the client may see a source."""
        return topic(source, "event").startswith(_prefixes(self.sources))

    def granted(self, subscription: bytes) -> list[bytes]:
        """Return the granted part of a subscription, as subscriptions that do not overlap.

        Args:
            subscription: a prefix of topics; ``b""`` stands for all topics.
        """
        prefixes = _prefixes(self.sources)
        if subscription.startswith(prefixes):
            return [subscription]
        return [prefix for prefix in prefixes if prefix.startswith(subscription)]


@lru_cache(maxsize=1024)
def _prefixes(sources: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return the topic prefixes of these sources; none of them is a prefix of another."""
    prefixes: list[bytes] = []
    for prefix in sorted(
        f"{VERSION}/{name[:-1] if name.endswith('*') else name + '/'}".encode() for name in sources
    ):
        if not prefixes or not prefix.startswith(prefixes[-1]):
            prefixes.append(prefix)
    return tuple(prefixes)


EVERYTHING = ClientRights(sources=("*",), control=True)


def rights_path(key: str | Path) -> Path:
    """Return the rights file that belongs to a ``.key`` file."""
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
            f"{key}: no rights file; run maskcast keys allow {key} --sources 'door,yard*' "
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
    """Create rights from user input.

    Raises:
        InputError: a name is invalid, or there are too many.
    """
    try:
        return msgspec.convert({"sources": sources, "control": control}, ClientRights)
    except msgspec.ValidationError:
        wrong = [name for name in sources if not re.fullmatch(_PATTERN, name)]
        raise InputError(
            f"invalid source {wrong[0]!r}: expected a name, the beginning of names and *, or *"
            if wrong
            else f"{len(sources)} sources are too many; use the beginning of names and *"
        ) from None


def write_rights(key: str | Path, rights: ClientRights) -> Path:
    """Write the rights file of a ``.key`` file. An existing one is replaced atomically.

    Returns:
        The path of the rights file.

    Raises:
        InputError: the file cannot be written.
    """
    path = rights_path(key)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(msgspec.yaml.encode(rights))
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    return path
