"""Recordings: MCAP files that hold messages as they were sent (docs/clients.md)."""

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
"""``message_encoding`` of the channels: a msgpack array of the parts behind the topic."""

FILE_SCHEME = "file:"

CHUNK_BYTES = 1 << 20

MAX_RECORD_BYTES = 256 << 20
"""Longest MCAP record that is read; a chunk holds one message of at most 64 MiB beyond 1 MiB."""

_logger = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(list[bytes])


class RawMessage(NamedTuple):
    """The parts of a message, and when it was received (UTC nanoseconds)."""

    parts: list[bytes]
    received_ns: int


class RecordingWriter:
    """Writes messages to a new MCAP file, in compressed and indexed chunks.

    If the process is killed, the file is readable up to the last ``flush``.

    Args:
        path: the file; it must not exist.

    Raises:
        InputError: the file exists, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        require_mcap()
        from mcap.writer import Writer

        self.path = path
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise InputError(f"{path}: exists; choose another name, or delete it") from None
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
        """Bytes of the file, with those not written yet before their compression."""
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
            sequence=header.seq & 0xFFFFFFFF,  # MCAP has 32 bits for it; the header has them all
        )
        self._pending_bytes = min(self._pending_bytes + len(data), CHUNK_BYTES)

    def flush(self) -> None:
        """Write the chunk in progress, so that it survives the end of this process.

        Raises:
            OSError: it cannot be written, or the file was deleted.
        """
        self._writer.flush()  # type: ignore[no-untyped-call]
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was deleted", str(self.path))
        self._pending_bytes = 0
        self._flushed_bytes = self._file.tell()

    def abandon(self) -> None:
        """Close the file after an error, as it was after the last ``flush``.

        It is deleted if it holds no message.
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

    A file that ends early, because its recorder was killed, is read up to its last whole chunk,
    and that is logged (``recording_truncated``). Channels of other programs are left out.

    Raises:
        InputError: the file cannot be read, is no MCAP file, or is damaged.
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
                    raise InputError(f"{path}: damaged at its end, behind all messages") from None
                raise InputError(f"{path}: not a recording; expected an MCAP file") from None
            except Exception as error:  # of the reader, struct, zstandard and lz4
                if file.read(1):
                    at = file.tell()
                    raise InputError(f"{path}: damaged before byte {at}: {error}") from error
                if file.tell() < 8:
                    raise InputError(f"{path}: not a recording; expected an MCAP file") from None
                shown = fields(
                    file=path,
                    advice="its recorder was killed or could not write; the rest is complete",
                )
                _logger.warning("recording_truncated", extra=shown)
                return
            if message is not None:
                yield message


def recording_path(endpoint: str) -> Path | None:
    """Return the path of "file:PATH"; None for another endpoint."""
    if not endpoint.startswith(FILE_SCHEME):
        return None
    return Path(endpoint.removeprefix(FILE_SCHEME).removeprefix("//"))


def check_recordings(endpoints: Sequence[str]) -> tuple[Path, ...]:
    """Return the paths if the endpoints are recordings, nothing if they are none.

    Raises:
        InputError: some are and some are not, or a file does not exist.
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
    """Check that the package is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import mcap.writer
        import zstandard
    except ImportError as error:
        raise InputError(
            f"recordings need the package {error.name}: run pip install 'maskcast[record]'"
        ) from None
    del mcap, zstandard
