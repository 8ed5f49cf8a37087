"""Lines of a UTF-8 file with their numbers, so that every complaint about a file can say where."""

from collections.abc import Iterator
from pathlib import Path

from lad_dist.config import UserError

BYTE_ORDER_MARK = "\ufeff"


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) for each line; only \\n and \\r\\n end one, and a byte order mark is
    dropped. Raises UserError naming file and line where the bytes are not UTF-8, or when the file cannot be read."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                text = _decode(file, number, line).removesuffix("\n").removesuffix("\r")
                yield number, text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _decode(file: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise UserError(f"{file}:{number}: not UTF-8 (byte 0x{byte:02x}); convert the file first") from None
