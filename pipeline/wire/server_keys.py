"""ServerKeys: the keys of a server, and the clients that may connect with their rights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.wire.curve import PUBLIC, KeyPair, read_key_pair, read_public_key
from maskcast.pipeline.wire.rights import EVERYTHING, ClientRights, read_rights, rights_path

Purpose = Literal["subscribe", "control", "publish"]
"""The purpose for which clients connect. Clients that publish to a gateway need no rights file."""

KeyFiles = str | Path | tuple[str, ...]
"""A folder of ``.key`` files, or several files and folders."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The keys of a server: its own pair, and the clients that may connect.

    Attributes:
        own: the server's key pair.
        clients: the rights of each client, by its public key.
        read_from: the folder or files from which ``clients`` was read; None if it was not read.
        purpose: the purpose for which clients connect: "subscribe", "control" or "publish".
    """

    own: KeyPair
    clients: Mapping[bytes, ClientRights]
    read_from: KeyFiles | None = None
    purpose: Purpose = "subscribe"

    @classmethod
    def read(
        cls,
        secret_key: str | Path,
        allowed_clients: str | Path | Sequence[str],
        purpose: Purpose = "subscribe",
    ) -> Self:
        """Read the keys and rights from files.

        Args:
            secret_key: the server's ``.key_secret`` file.
            allowed_clients: a folder of ``.key`` files, or several files and folders. Each key
                needs a rights file next to it (``maskcast keys allow``), unless clients publish.
            purpose: the purpose for which clients connect; "control" admits only clients with that
                right.

        Raises:
            InputError: a file cannot be read or is not a key file, other users can read the secret
                key, a client has no rights file, or there are no clients.
        """
        own = read_key_pair(secret_key)
        read_from = (
            allowed_clients if isinstance(allowed_clients, (str, Path)) else tuple(allowed_clients)
        )
        if isinstance(read_from, (str, Path)) and not Path(read_from).is_dir():
            raise InputError(
                f"{read_from}: not a folder; put the clients' {PUBLIC} files in one, or list them"
            )
        files = _key_files(read_from)
        if not files:
            raise InputError(f"{read_from}: no client keys; put the clients' {PUBLIC} files there")
        clients = dict(_read_client(file, purpose) for file in files)
        clients = _admitted(clients, purpose)
        if not clients:
            raise InputError(
                f"{read_from}: no client may control; run maskcast keys allow {files[0]} "
                "--sources '*' --control"
            )
        return cls(own, clients, read_from, purpose)


class AllowedClients:
    """The clients that may connect, read again when their files change.

    Call ``reload`` on one thread; ``rights`` may be read on any thread.

    Args:
        keys: as returned by ``ServerKeys.read``; keys that were not read from files do not change.

    Attributes:
        rights: the rights of each client, by its public key, 40 characters of Z85.
    """

    def __init__(self, keys: ServerKeys) -> None:
        self._read_from = keys.read_from
        self._purpose: Purpose = keys.purpose
        # Empty, so that the first ``reload`` reads the files: they may have changed since.
        self._last_state: list[tuple[str, int, int, int]] = []
        self.rights = keys.clients

    def reload(self) -> frozenset[bytes]:
        """Read the files again if one has changed.

        A client whose key or rights cannot be read is not allowed. This is logged.

        Returns:
            The keys that were withdrawn, or whose rights have changed.
        """
        if self._read_from is None or (state := self._state()) == self._last_state:
            return frozenset()
        self._last_state = state
        before, now = self.rights, dict[bytes, ClientRights]()
        for path in _key_files(self._read_from):
            try:
                key, rights = _read_client(path, self._purpose)
            except InputError as error:
                _logger.warning("client_not_allowed", extra=fields(reason=error))
            else:
                now[key] = rights
        self.rights = now = _admitted(now, self._purpose)
        changed = frozenset(key for key, rights in before.items() if now.get(key) != rights)
        added = len(now.keys() - before.keys())
        if added or changed:
            shown = fields(allowed=len(now), added=added, changed=len(changed))
            _logger.info("client_keys_read", extra=shown)
        return changed

    def _state(self) -> list[tuple[str, int, int, int]]:
        """Return the names, modification times, sizes and inodes of the files."""
        state = []
        for key in _key_files(self._read_from or ()):
            for path in (Path(key), rights_path(key)):
                try:
                    found = path.stat()
                except OSError:
                    continue
                state.append((str(path), found.st_mtime_ns, found.st_size, found.st_ino))
        return state


def _read_client(file: str | Path, purpose: Purpose) -> tuple[bytes, ClientRights]:
    key = read_public_key(file)
    return key, EVERYTHING if purpose == "publish" else read_rights(file)


def _admitted(clients: Mapping[bytes, ClientRights], purpose: Purpose) -> dict[bytes, ClientRights]:
    """Return the clients that may connect for this purpose."""
    return {
        key: rights for key, rights in clients.items() if purpose != "control" or rights.control
    }


def _key_files(read_from: KeyFiles) -> Sequence[str | Path]:
    if isinstance(read_from, (str, Path)):
        return sorted(Path(read_from).glob(f"*{PUBLIC}"))
    files: list[str | Path] = []
    for given in read_from:
        files += _key_files(given) if Path(given).is_dir() else [given]
    return files
