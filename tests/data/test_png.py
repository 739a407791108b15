"""What a PNG's chunks decide: levels that are transparent, grey, and metadata that never decides."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from imagewright.data import png
from imagewright.data.pixels import BadPicture, decode


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def file(depth: int, colour: int, rows: list[bytes], *between: bytes, width: int = 4) -> bytes:
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return png.SIGNATURE + chunk(b"IHDR", head) + b"".join(between) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "row", "level", "expected"),
    [
        (1, b"\x50", 0, [255, 255, 255, 255]),  # bits 0101
        (2, b"\x1b", 1, [0, 255, 170, 255]),  # levels 0 1 2 3
        (2, b"\x1b", 0, [255, 85, 170, 255]),
        (4, b"\x05\xaf", 5, [0, 255, 170, 255]),
        (4, b"\x05\xaf", 10, [0, 85, 255, 255]),
        (8, bytes([0, 85, 170, 255]), 170, [0, 85, 255, 255]),
        (16, struct.pack(">4H", 0, 85 * 257, 170 * 257, 65535), 85 * 257, [0, 255, 170, 255]),
    ],
)
def test_the_transparent_grey_is_a_level_of_the_file(depth: int, row: bytes, level: int, expected: list[int]) -> None:
    pixels = decode(file(depth, 0, [row], chunk(b"tRNS", struct.pack(">H", level))))
    assert pixels.shape == (1, 4, 1) and pixels.ravel().tolist() == expected


def test_the_transparent_colour_of_16_bits() -> None:
    one, other = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC), struct.pack(">3H", 0x1200, 0x0078, 0x9A00)
    pixels = decode(file(16, 2, [one + other], chunk(b"tRNS", one), width=2))
    assert pixels.tolist() == [[[255, 255, 255], [0x12, 0x00, 0x9A]]]


@pytest.mark.parametrize(("depth", "pack"), [(8, ">BB"), (16, ">HH")])
def test_grey_with_alpha_has_one_channel(depth: int, pack: str) -> None:
    top = 2**depth - 1
    row = struct.pack(pack, top // 5, top) + struct.pack(pack, 0, 0)
    assert decode(file(depth, 4, [row], width=2)).tolist() == [[[51], [255]]]


ROWS = [bytes(range(12)), bytes(range(12, 24))]
PLAIN = decode(file(8, 2, ROWS))
BOMB = zlib.compress(b"a" * (1 << 21))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"parameters\0\0" + BOMB),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"profile\0\0" + BOMB),
        chunk(b"tEXt", b"a\0bc", crc=0),
        chunk(b"zTXt", b"a\0\0no zlib stream"),
        chunk(b"iTXt", b"a"),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"\0\0"),
        chunk(b"sRGB", b""),
        chunk(b"eXIf", b"MM\0*\0\0\xff\xff"),
        chunk(b"tIME", b"", crc=1),
    ],
)
def test_metadata_never_decides(metadata: bytes) -> None:
    assert np.array_equal(decode(file(8, 2, ROWS, metadata)), PLAIN)


@pytest.mark.parametrize("kind", [b"tRNS", b"PLTE", b"tRNt", b"IDAT"])
def test_a_wrong_checksum_of_what_may_be_pixels_does(kind: bytes) -> None:
    """Also of a kind that nobody knows: it may have been another before a bit fell over."""
    with pytest.raises(BadPicture, match=f"damaged: wrong checksum of {kind.decode()}"):
        decode(file(8, 2, ROWS, chunk(kind, b"\0" * 6, crc=7)))


def test_metadata_does_not_hide_other_damage() -> None:
    whole = file(8, 2, ROWS, chunk(b"tEXt", b"a\0bc", crc=0))
    for end in range(len(whole) - 12):
        with pytest.raises(BadPicture):
            decode(whole[:end])
