"""Recordings: MCAP files with messages as they were sent (docs/clients.md)."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.wire.message import Header

if TYPE_CHECKING:
    from mcap.records import McapRecord

ENCODING = "maskcast-v1"
"""``message_encoding`` of the channels: a msgpack array of the parts after the topic."""

FILE_SCHEME = "file:"

CHUNK_BYTES = 1 << 20

MAX_RECORD_BYTES = 256 << 20
"""Maximum length of an MCAP record; a chunk exceeds 1 MiB by at most one message of 64 MiB."""

_logger = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(list[bytes])


class RawMessage(NamedTuple):
    """The parts of a message, and when it was received, UTC nanoseconds."""

    parts: list[bytes]
    received_ns: int


class RecordingWriter:
    """Writes messages to a new MCAP file, in compressed and indexed chunks.

    If the process is killed, the file is readable up to the last ``flush``.

    Args:
        path: the file; it must not exist.

    Raises:
        InputError: the file exists or cannot be written, or the package ``mcap`` is missing.
    """

    def __init__(self, path: Path) -> None:
        require_mcap()
        from mcap.writer import Writer

        self.path = path
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise InputError(f"{path}: already exists; choose another name, or delete it") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES)
        self._channels: dict[str, int] = {}
        self._pending_bytes = self._flushed_bytes = self._header_bytes = 0
        try:
            self._writer.start(profile="maskcast")
            self.flush()
            self._header_bytes = self._flushed_bytes
        except OSError as error:
            self.abandon()
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size of the file in bytes, including uncompressed data that is not written yet."""
        return self._file.tell() + self._pending_bytes

    def write(self, message: RawMessage, header: Header) -> None:
        """Append a message.

        Args:
            message: its parts as they were sent.
            header: its decoded part 1.

        Raises:
            OSError: it cannot be written.
        """
        topic, *parts = message.parts
        name = topic.decode("ascii")
        if (channel := self._channels.get(name)) is None:
            channel = self._writer.register_channel(name, ENCODING, 0)
            self._channels[name] = channel
        data = msgspec.msgpack.encode(parts)
        self._writer.add_message(
            channel,
            log_time=message.received_ns,
            data=data,
            publish_time=header.publish_ns,
            sequence=header.seq & 0xFFFFFFFF,  # 32 bits in MCAP; the header contains all bits
        )
        self._pending_bytes = min(self._pending_bytes + len(data), CHUNK_BYTES)

    def flush(self) -> None:
        """Write the current chunk, so that it is not lost if this process is killed.

        Raises:
            OSError: it cannot be written, or the file was deleted.
        """
        self._writer.flush()  # type: ignore[no-untyped-call]
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was deleted", str(self.path))
        self._pending_bytes = 0
        self._flushed_bytes = self._file.tell()

    def abandon(self) -> None:
        """Close the file after an error, truncated to its state after the last ``flush``.

        It is deleted if it contains no messages.
        """
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            if self._flushed_bytes > self._header_bytes:
                os.truncate(self.path, self._flushed_bytes)
            else:
                self.path.unlink()

    def close(self) -> None:
        """Write the index and close the file."""
        try:
            self._writer.finish()  # type: ignore[no-untyped-call]
        finally:
            self._file.close()


def read_recording(path: Path) -> Iterator[RawMessage]:
    """Yield the messages of a recording, in the order in which they arrived.

    A truncated file, whose recorder was killed, is read up to its last complete chunk, and this is
    logged (``recording_truncated``). Channels of other programs are ignored.

    Raises:
        InputError: the file cannot be read, is not an MCAP file, or is damaged.
    """
    require_mcap()
    from mcap.exceptions import InvalidMagic
    from mcap.records import Channel, Message
    from mcap.stream_reader import StreamReader

    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        reader = StreamReader(file, validate_crcs=True, record_size_limit=MAX_RECORD_BYTES)
        records: Iterator[McapRecord] = iter(reader.records)
        topics: dict[int, bytes] = {}
        while True:
            try:
                record = next(records, None)
                message = None
                if record is None:
                    return
                if isinstance(record, Channel) and record.message_encoding == ENCODING:
                    topics[record.id] = record.topic.encode("ascii")
                elif isinstance(record, Message) and record.channel_id in topics:
                    parts = [topics[record.channel_id], *_decoder.decode(record.data)]
                    message = RawMessage(parts, record.log_time)
            except InvalidMagic:
                if file.tell() > 8:
                    raise InputError(f"{path}: damaged at its end, after all messages") from None
                raise InputError(f"{path}: not a recording; expected an MCAP file") from None
            except Exception as error:  # raised by the reader, struct, zstandard or lz4
                if file.read(1):
                    at = file.tell()
                    raise InputError(f"{path}: damaged before byte {at}: {error}") from error
                if file.tell() < 8:
                    raise InputError(f"{path}: not a recording; expected an MCAP file") from None
                shown = fields(
                    file=path,
                    advice="the recorder was killed or could not write; the rest is complete",
                )
                _logger.warning("recording_truncated", extra=shown)
                return
            if message is not None:
                yield message


def recording_path(endpoint: str) -> Path | None:
    """Return the path in "file:PATH"; None for other endpoints."""
    if not endpoint.startswith(FILE_SCHEME):
        return None
    return Path(endpoint.removeprefix(FILE_SCHEME).removeprefix("//"))


def check_recordings(endpoints: Sequence[str]) -> tuple[Path, ...]:
    """Return the paths if the endpoints are recordings; an empty tuple if none of them is.

    Raises:
        InputError: only some of them are recordings, a file does not exist, or the package ``mcap``
            is missing.
    """
    paths = [recording_path(endpoint) for endpoint in endpoints]
    if not any(paths):
        return ()
    for endpoint, path in zip(endpoints, paths, strict=True):
        if path is None:
            raise InputError(f"{endpoint}: recordings and publishers cannot be mixed; use one kind")
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a recording made by maskcast record")
    require_mcap()
    return tuple(path for path in paths if path is not None)


def require_mcap() -> None:
    """Check that the packages for recordings are installed.

    Raises:
        InputError: one of them is missing.
    """
    try:
        import mcap.writer
        import zstandard
    except ImportError as error:
        raise InputError(
            f"recordings: the package {error.name} is missing; run pip install 'maskcast[record]'"
        ) from None
    del mcap, zstandard
