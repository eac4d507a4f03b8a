"""Lines of a text file, plain or gzip, read right or refused: encodings, line ends, torn archives, with the row.

Lines are read one by one (files larger than memory stream) and end at LF, CRLF or CR. UTF-8 is read with or without a
byte order mark, UTF-16 and UTF-32 with one; any other encoding is refused at the row where it shows.
"""

from __future__ import annotations

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from biokit.errors import DataError

MAX_LINE_CHARS = 16 * 2**20

_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "Parquet under another name",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    _GZIP_MAGIC: "gzip inside gzip",
}
_MARKS = (  # UTF-32 first: its little endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class LineReader:
    """Iterate over the lines of a file, line ends included; a context manager.

    Attributes:
        num_lines: lines read so far, so the 1-based number of the line that was read last, `line`.

    Raises:
        DataError: no such file, a folder, no permission, another format, an encoding that is not Unicode, a torn gzip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0
        self.line = ""
        self._binary = _open_binary(path)
        try:
            self._text = self._decode()
        except BaseException:
            self._binary.close()
            raise

    def __enter__(self) -> LineReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._text.close()
        self._binary.close()

    def __iter__(self) -> Iterator[str]:
        readline = self._text.readline
        while True:
            try:
                line = readline(MAX_LINE_CHARS)
            except (OSError, EOFError, zlib.error, UnicodeError) as error:
                raise self._refused(error) from error
            if not line:
                return
            self.num_lines += 1
            self.line = line
            if not line.isascii():
                self._check_unicode(line)
            if len(line) == MAX_LINE_CHARS and line[-1] not in "\r\n":
                raise self._error(f"the line is longer than {MAX_LINE_CHARS:,} characters", "Is this a text table?")
            yield line

    def _decode(self) -> io.TextIOWrapper:
        try:
            head = self._binary.peek(4096)[:4096]  # type: ignore[attr-defined]
        except (OSError, EOFError, zlib.error) as error:
            raise self._refused(error) from error
        kind = next((kind for magic, kind in _OTHER_MAGIC.items() if head.startswith(magic)), "")
        if kind:
            raise DataError(f"table {self.path}", f"it is {kind}", "Save it as CSV, TSV, .smi, .sdf or .parquet")
        encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")
        if encoding.startswith("utf-8") and head.count(0) > len(head) // 10:
            found = "it is binary, or UTF-16 without a byte order mark"
            raise DataError(f"table {self.path}", found, "Save it as UTF-8 text")
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        return io.TextIOWrapper(self._binary, encoding=encoding, errors=errors, newline="")

    def _check_unicode(self, line: str) -> None:
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) - 0xDC00
            found = f"byte 0x{byte:02x} at character {error.start + 1} is not UTF-8 (Latin-1, perhaps)"
            raise self._error(found, "Save the file as UTF-8") from None

    def _refused(self, error: Exception) -> DataError:
        if isinstance(error, EOFError):
            cause = "the gzip file is cut off after the last whole row"
        elif isinstance(error, (gzip.BadGzipFile, zlib.error)):
            cause = f"the gzip file is damaged ({error})"
        elif isinstance(error, UnicodeError):
            cause = f"the text is not valid ({error})"
        else:
            cause = f"it cannot be read ({error})"
        self.num_lines += 1
        return self._error(cause, "Get the file again" if "gzip" in cause else "Save the file as UTF-8")

    def _error(self, found: str, do: str) -> DataError:
        return DataError(f"{self.path} row {self.num_lines}", found, do)


def check_file(path: Path) -> None:
    """Refuse what is no regular file: a table is read more than once, and a pipe would be empty the second time.

    Raises:
        DataError: no such file, a folder, a pipe or a device.
    """
    asked = f"table {path}"
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(asked, f"it cannot be opened ({cause})", "Check the path") from error
    if stat.S_ISDIR(mode):
        raise DataError(asked, "it is a folder", "Name a file in it, or give the folder as data.dataset_path")
    if not stat.S_ISREG(mode):
        raise DataError(asked, "it is a pipe or a device", "Write its content to a file first")


def _open_binary(path: Path) -> IO[bytes]:
    check_file(path)
    asked = f"table {path}"
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(asked, f"it cannot be opened ({error.strerror})", "Check the path") from error
    if raw.peek(2)[:2] == _GZIP_MAGIC:
        return io.BufferedReader(_Unzipped(raw))
    if path.suffix.lower() == ".gz" and raw.peek(1):
        raw.close()
        raise DataError(asked, "its name ends in .gz, but it is not gzip", "Rename it, or compress it again")
    return raw


class _Unzipped(gzip.GzipFile):
    """A gzip stream that closes the file below it."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._below = raw

    def close(self) -> None:
        super().close()
        self._below.close()
