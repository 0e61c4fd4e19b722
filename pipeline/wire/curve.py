"""Keys: CURVE key pairs of servers and clients, stored in files.

The files are ZeroMQ certificates, as CZMQ and pyzmq read and write them. ``name.key`` contains the
public key and may be shared. ``name.key_secret`` contains both keys and must not leave its machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.auth

from maskcast.engines.errors import InputError

PUBLIC, SECRET = ".key", ".key_secret"

_Z85_KEY = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE25519 key pair, each key as 40 characters of Z85 (ZeroMQ's RFC 32)."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """The keys of a client: its own pair, and the server's public key."""

    own: KeyPair
    server: bytes

    @classmethod
    def read(cls, server_key: str | Path, client_key: str | Path) -> Self:
        """Read the keys from files.

        Args:
            server_key: the publisher's ``.key`` file.
            client_key: the subscriber's ``.key_secret`` file.

        Raises:
            InputError: a file cannot be read or is not of this kind, or other users can read the
                secret key.
        """
        return cls(read_key_pair(client_key), read_public_key(server_key))

    def apply(self, socket: zmq.Socket[Any]) -> None:
        """Encrypt a socket that is not connected yet."""
        socket.set(zmq.CURVE_SERVERKEY, self.server)
        socket.set(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.set(zmq.CURVE_SECRETKEY, self.own.secret)


def new_keys(name: Path) -> tuple[Path, Path]:
    """Create a key pair and write it to ``name.key`` (0644) and ``name.key_secret`` (0600).

    Returns:
        The two files, the public one first.

    Raises:
        InputError: one of the files exists, the folder does not, or a file cannot be written.
    """
    files = Path(f"{name}{PUBLIC}"), Path(f"{name}{SECRET}")
    if name.is_dir() or not name.name:
        raise InputError(f"{name}: is a folder; add a name for the keys, like {name / 'server'}")
    if not name.parent.is_dir():
        raise InputError(f"{name}: no such folder: {name.parent}; create it first")
    for file in files:
        if os.path.lexists(file):
            raise InputError(f"{file}: already exists; choose another name, or delete it")
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    text = _public_text(public)
    try:
        _write_new(files[1], f'{text}    secret-key = "{secret}"\n', 0o600)
        _write_new(files[0], text, 0o644)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None
    return files


def write_public_key(path: Path, public: bytes) -> Path:
    """Write a public key to a new ``.key`` file (0644), and return its path.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    try:
        _write_new(path, _public_text(public.decode("ascii")), 0o644)
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None
    return path


def read_public_key(path: str | Path) -> bytes:
    """Read a public key: 40 characters of Z85.

    Raises:
        InputError: the file cannot be read, is not a key file, or contains a secret key, which must
            not be stored where only the public one is needed.
    """
    public, secret = _load(path)
    if secret is not None:
        raise InputError(f"{path}: contains a secret key; use the {PUBLIC} file")
    return public


def read_key_pair(path: str | Path) -> KeyPair:
    """Read a key pair from a ``.key_secret`` file.

    Raises:
        InputError: the file cannot be read, contains no secret key or keys that do not match, or
            other users can read it.
    """
    public, secret = _load(path)
    if secret is None:
        raise InputError(f"{path}: contains no secret key; use the {SECRET} file")
    if Path(path).stat().st_mode & 0o077:
        raise InputError(f"{path}: other users can read the secret key; run chmod 600 {path}")
    if zmq.curve_public(secret) != public:
        raise InputError(f"{path}: the two keys do not match; make new ones with maskcast keys new")
    return KeyPair(public, secret)


def _public_text(public: str) -> str:
    return f'metadata\ncurve\n    public-key = "{public}"\n'


def _write_new(file: Path, text: str, mode: int) -> None:
    """Write a new file. Its permissions are set before its content is written."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        os.fchmod(handle, mode)  # regardless of the umask
        stream.write(text)


def _load(path: str | Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except ValueError:
        public, secret = b"", None
    except OSError as error:
        reason = error.strerror or "no such file"
        raise InputError(f"cannot read the key {path}: {reason}") from None
    if not all(_Z85_KEY.fullmatch(key) for key in (public, secret) if key is not None):
        raise InputError(f"{path}: not a key file; make one with maskcast keys new")
    return public, secret
