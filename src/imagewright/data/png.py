"""What a PNG says of itself outside its pixels, read from its chunks: colour type, transparent level, metadata.

Source: the PNG specification (ISO/IEC 15948), sections 5.3 (chunks), 11.2.2 (IHDR) and 11.3.2.1 (tRNS).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks that decide what the pixels are."""
_METADATA = frozenset(
    b"tEXt zTXt iTXt tIME pHYs gAMA cHRM sRGB iCCP eXIf bKGD hIST sBIT sPLT oFFs sCAL pCAL cICP mDCV cLLI".split()
)
"""Chunks that may be damaged without harm; one of another kind may have been anything before it was."""
_GREY, _RGB, _GREY_ALPHA = 0, 2, 4


class Damaged(Exception):  # noqa: N818 - a finding about a file
    """A chunk that pixels depend on is damaged."""


@dataclass(frozen=True)
class Facts:
    """What the decoder does not tell.

    grey: the file has levels of grey (and perhaps alpha) only.
    transparent: the 8-bit value of the level (grey) or colour (three of them) that tRNS makes transparent, where the
    decoder would compare it in another depth; None where it does right or there is none.
    """

    grey: bool
    transparent: tuple[int, ...] | None


def is_png(content: bytes) -> bool:
    """Whether the bytes begin as a PNG does."""
    return content.startswith(SIGNATURE)


def facts(content: bytes) -> Facts:
    """Read the header and tRNS; what is too short to be read is left to the decoder's complaint."""
    depth, colour, level = 8, _RGB, b""
    for kind, data, _ in _chunks(content):
        if kind == b"IHDR" and len(data) == 13:
            depth, colour = data[8], data[9]
        elif kind == b"tRNS":
            level = data
        elif kind == b"IDAT":
            break
    transparent: tuple[int, ...] | None = None
    if colour == _GREY and depth in (2, 4) and len(level) == 2:
        transparent = (int.from_bytes(level) * 255 // (2**depth - 1),)
    elif colour == _RGB and depth == 16 and len(level) == 6:
        transparent = tuple(value >> 8 for value in struct.unpack(">3H", level))
    return Facts(grey=colour in (_GREY, _GREY_ALPHA), transparent=transparent)


def without_metadata(content: bytes) -> bytes:
    """The same pixels without any other chunk. Raises Damaged on a wrong checksum of a chunk that is no metadata."""
    kept = [SIGNATURE]
    for kind, data, crc in _chunks(content):
        if kind not in _METADATA and crc != zlib.crc32(kind + data):
            raise Damaged(f"wrong checksum of {ascii(kind)[2:-1]}")
        if kind in _OF_PIXELS:
            kept.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc))
    return b"".join(kept)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """(kind, data, checksum) of every chunk that is whole, up to IEND."""
    at = len(SIGNATURE)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            return
        kind, data = content[at + 4 : at + 8], content[at + 8 : end]
        yield kind, data, struct.unpack_from(">I", content, end)[0]
        if kind == b"IEND":
            return
        at = end + 4
