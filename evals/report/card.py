"""The section of an artifact's README.md that says what was measured, between two markers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from llmlite.errors import InputError

BEGIN = b"<!-- llmlite report: begin -->"
END = b"<!-- llmlite report: end -->"


def write_card(file: Path, section: str, title: str) -> None:
    """Put ``section`` (Markdown) between the markers of ``file``, at its end where it has none yet.

    Every byte outside the markers stays as it is. A file that is not there is made, with ``title`` as its heading.
    The file is replaced in a single step. `InputError` where the markers do not make one pair.
    """
    file = file.resolve()
    before = file.read_bytes() if file.is_file() else f"# {title}\n".encode()
    after = with_section(before, section, str(file))
    if after == before and file.is_file():
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(after)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, file.stat().st_mode & 0o777 if file.is_file() else 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def with_section(before: bytes, section: str, where: str) -> bytes:
    """``before`` with the section in its place; line ends are those that ``before`` has."""
    newline = b"\r\n" if b"\r\n" in before else b"\n"
    text = section.strip().encode()
    if BEGIN in text or END in text:
        raise ValueError("the section itself has a marker in it")
    inner = newline.join([BEGIN, b"", *text.splitlines(), b"", END])
    starts, ends = before.count(BEGIN), before.count(END)
    if (starts, ends) == (0, 0):
        gap = b"" if not before else newline if before.endswith(newline) else newline * 2
        return before + gap + inner + newline
    start, end = before.find(BEGIN), before.find(END)
    if (starts, ends) != (1, 1) or end < start:
        raise InputError(
            f"{where}: has {starts} begin and {ends} end markers of an llmlite report; one of each, in this order, is "
            "right"
        )
    return before[:start] + inner + before[end + len(END) :]
