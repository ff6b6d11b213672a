"""A bundle's container: a zip of stored members, every byte of which is accounted for.

Any zip tool lists and unpacks one. The layout is the plainest there is:

    per member:  local header (30 bytes), name, content
    directory:   per member a record (46 bytes) and its name
    end record   (22 bytes)

Nothing stands between these parts; there is no compression, encryption, comment, extra field or
date (all are 1980-01-01), and no zip64, so an archive is below 4 GiB. The reader makes all headers
anew from names, sizes and checksums and compares them with the file: a flipped bit is found
wherever it is, nothing hides between members, and nothing unpacks to more than its bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
import uuid
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fuseengine.errors import BundleError

MOST_BYTES = 2**32 - 1
"""Size of an archive that its 32-bit offsets can describe."""

MOST_MEMBERS = 10_000

_BLOCK = 1 << 20
_VERSION, _STORED, _TIME, _DATE = 20, 0, 0, 33  # zip 2.0; 1980-01-01 00:00

_LOCAL = struct.Struct("<4s5H3I2H")
_RECORD = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCAL_MARK, _RECORD_MARK, _END_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"

# Plain names alone: no absolute path, no "..", no backslash, no drive, no hidden file.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_LONGEST_NAME = 200


class Member(NamedTuple):
    """A file in the archive.

    Attributes:
        name: with forward slashes.
        size: bytes.
        crc: CRC-32 of the content.
        offset: of its local header in the archive.
    """

    name: str
    size: int
    crc: int
    offset: int

    @property
    def start(self) -> int:
        """Where its content begins."""
        return self.offset + _LOCAL.size + len(self.name)

    @property
    def end(self) -> int:
        """Where its content ends."""
        return self.start + self.size

    def local_header(self) -> bytes:
        """What stands before its content."""
        name = self.name.encode()
        return (
            _LOCAL.pack(
                _LOCAL_MARK, _VERSION, 0, _STORED, _TIME, _DATE,
                self.crc, self.size, self.size, len(name), 0,
            )
            + name
        )  # fmt: skip

    def record(self) -> bytes:
        """What stands in the directory for it."""
        name = self.name.encode()
        return (
            _RECORD.pack(
                _RECORD_MARK, _VERSION, _VERSION, 0, _STORED, _TIME, _DATE,
                self.crc, self.size, self.size, len(name), 0, 0, 0, 0, 0, self.offset,
            )
            + name
        )  # fmt: skip


class Archive:
    """An archive opened for reading; ``close()`` it, or use it in a ``with`` statement.

    Opening reads and checks the directory alone: names, sizes and places.

    Attributes:
        close: closes the file, once.
        path: of the file.
        size: of the file in bytes.
        members: by name, in the file's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file.

        Raises:
            BundleError: it cannot be read, is no zip, is cut off, or holds what it must not.
        """
        self.path = Path(path)
        self._file = _open(self.path)
        # An engine keeps its bundle open for as long as it lives, and nobody closes an engine.
        self._lock, self.close = threading.Lock(), weakref.finalize(self, self._file.close)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.members = self._directory()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> bytes:
        """A member's content.

        Raises:
            BundleError: there is no such member, or its checksum differs.
        """
        return b"".join(self.blocks(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """A member's content in blocks of at most 1 MiB; its checksum is compared at the end.

        Raises:
            BundleError: as :meth:`read`.
        """
        if name not in self.members:
            raise self.error(f"holds no {name}")
        member = self.members[name]
        place, crc = member.start, 0
        while place < member.end:
            block = self._bytes(place, min(_BLOCK, member.end - place))
            place, crc = place + len(block), zlib.crc32(block, crc)
            yield block
        if crc != member.crc:
            raise self.error(f"is damaged: the checksum of {name} differs; get the file again")

    def check_layout(self) -> None:
        """Compare everything that is not content with what :func:`write` makes.

        Raises:
            BundleError: it differs anywhere.
        """
        place, records = 0, []
        for member in self.members.values():
            header = member.local_header()
            if member.offset != place or self._bytes(place, len(header)) != header:
                raise self.error(
                    f"is damaged, or not as FuseEngine writes it: the header of {member.name} "
                    "differs from its entry in the directory"
                )
            place = member.end
            records.append(member.record())
        tail = _tail(records, place)
        if self.size != place + len(tail) or self._bytes(place, len(tail)) != tail:
            raise self.error("is damaged, or not as FuseEngine writes it: its directory differs")

    def error(self, message: str) -> BundleError:
        """An error that names the file."""
        return BundleError(f"{self.path} {message}")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bytes(self, place: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(place)
            content = self._file.read(count)
        if len(content) != count:
            raise self.error(f"is cut off at byte {place + len(content)}; get the file again")
        return content

    def _directory(self) -> dict[str, Member]:
        start = self._bytes(0, min(4, self.size))
        if start not in (_LOCAL_MARK, _END_MARK) or self.size < _END.size:
            raise self.error(
                f"is no bundle: it begins with {start!r} and has {self.size} bytes; expected a "
                "file that Engine.save() or 'fuseengine compile' wrote"
            )
        end = self._bytes(self.size - _END.size, _END.size)
        mark, *_, count, length, place, comment = _END.unpack(end)
        if mark != _END_MARK or comment:
            raise self.error("is cut off, or not as FuseEngine writes it: it has no end record")
        if self.size > MOST_BYTES or count > MOST_MEMBERS:
            raise self.error(
                f"is too large: {self.size} bytes, {count} members; expected at most "
                f"{MOST_BYTES} and {MOST_MEMBERS}"
            )
        if place + length + _END.size != self.size or length < count * _RECORD.size:
            raise self.error(
                f"is damaged: its directory, {length} bytes at {place}, does not fit a file of "
                f"{self.size} bytes"
            )
        members: dict[str, Member] = {}
        directory, at = self._bytes(place, length), 0
        for _ in range(count):
            member, at = self._member(directory, at, place)
            if member.name in members:
                raise self.error(f"is refused: it holds {member.name} twice")
            members[member.name] = member
        if at != length:
            raise self.error("is damaged: bytes are left over in its directory")
        return members

    def _member(self, directory: bytes, at: int, limit: int) -> tuple[Member, int]:
        """The member whose record begins at a place in the directory, and where the next one is."""
        if at + _RECORD.size > len(directory):
            raise self.error("is damaged: its directory ends within a record")
        (mark, _, _, flags, method, _, _, crc, stored, size, length, *extra, _, _, offset) = (
            _RECORD.unpack_from(directory, at)
        )
        at += _RECORD.size
        name = directory[at : at + length].decode("ascii", "backslashreplace")
        if mark != _RECORD_MARK:
            raise self.error("is damaged: a record of its directory has no mark")
        if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise self.error(
                f"is refused: it holds {name[:60]!r}; expected plain relative names (no leading "
                "slash, no '..')"
            )
        if method != _STORED or flags or any(extra):
            raise self.error(
                f"is refused: {name} is compressed, encrypted or has extra fields; expected stored "
                "members only: write it again with FuseEngine"
            )
        member = Member(name, size, crc, offset)
        if stored != size or member.end > limit:
            raise self.error(
                f"is damaged or cut off: {name} says {size} bytes at {offset}, which the file of "
                f"{self.size} bytes does not hold"
            )
        return member, at + length


Content = bytes | tuple[Archive, str]
"""A member to write: its bytes, or the member of another archive to copy."""


def write(path: str | os.PathLike[str], members: Mapping[str, Content]) -> None:
    """Write an archive, whole or not at all: beside its place, then renamed.

    The same members give the same bytes.

    Args:
        path: an archive that is there is replaced.
        members: content by name, in order.

    Raises:
        BundleError: the file cannot be written, or would be too large.
    """
    path = Path(path)
    if path.is_dir():
        raise BundleError(f"cannot write {path}: it is a folder, expected a file name")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("xb") as file:
            _write(file, members, path)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        remedy = "make its folder first" if not path.parent.is_dir() else "check rights and space"
        raise BundleError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write(file: BinaryIO, members: Mapping[str, Content], path: Path) -> None:
    records: list[bytes] = []
    place = 0
    for name, content in members.items():
        if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise BundleError(f"cannot write {path}: the member's name {name!r} is not plain")
        if isinstance(content, bytes):
            member = Member(name, len(content), zlib.crc32(content), place)
            blocks: Iterable[bytes] = (content,)
        else:
            archive, source = content
            member = archive.members[source]._replace(name=name, offset=place)
            blocks = archive.blocks(source)
        if member.end + _END.size + (len(records) + 1) * (_RECORD.size + 200) > MOST_BYTES:
            raise BundleError(
                f"cannot write {path}: more than {MOST_BYTES} bytes, the most that a bundle has; "
                "leave precisions or plans out"
            )
        file.write(member.local_header())
        file.writelines(blocks)
        records.append(member.record())
        place = member.end
    file.write(_tail(records, place))


def _tail(records: list[bytes], place: int) -> bytes:
    """Directory and end record of an archive whose members end at a place."""
    directory = b"".join(records)
    count = len(records)
    end = _END.pack(_END_MARK, 0, 0, count, count, len(directory), place, 0)
    return directory + end


def _open(path: Path) -> BinaryIO:
    # A pipe would be waited for and a folder fails oddly.
    if not path.is_file():
        what = "it is no file" if path.exists() else "there is no such file"
        raise BundleError(f"cannot read {path}: {what}; expected a bundle (.fuse)")
    try:
        return path.open("rb")
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
