"""Bytes of a file as text: UTF-8 of any newlines, or an error that says what else it is."""

from __future__ import annotations

import codecs
import shlex

_OTHER_ENCODINGS = (  # in this order: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decoded(data: bytes, place: str, begins: bool = True) -> str:
    """The text of a file, or of a line of it; `begins` says whether it is where a file begins, and a mark may stand.

    Raises `ValueError` that names `place`, and the byte where it is not UTF-8 text.
    """
    for mark, encoding in _OTHER_ENCODINGS if begins else ():
        if data.startswith(mark):
            file = place.partition(", line ")[0]
            old, new = shlex.quote(file), shlex.quote(f"{file}.new")
            raise ValueError(
                f"{file} is {encoding} text, but UTF-8 is wanted. Convert it: "
                f"iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"
            )
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{place} is binary, not text: it has a zero byte at byte {nul}")
    try:
        text = data.decode("utf-8-sig" if begins else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. "
            f"Convert it (iconv -t UTF-8) or leave it out."
        ) from None
    return with_plain_newlines(text)


def with_plain_newlines(text: str) -> str:
    """A text whose lines end as they do on Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
