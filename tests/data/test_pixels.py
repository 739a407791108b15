"""Decoding: every kind of file gives the pixels a viewer would show, and damaged ones give a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagewright.data.pixels import BadPicture, box_reduce, decode, encode_png, with_channels

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 6), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_colour_is_kept(kind, options):
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(RGB), kind, **options)), RGB)


def test_grey_has_one_channel():
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(GREY)))[..., 0], GREY)
    bits = GREY > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)))[..., 0], bits * 255)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.floor(color * share + 255 * (1 - share) + 0.5)


def test_transparency_is_composited_on_white():
    rgba = np.dstack([RGB, GREY])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgba))), on_white(RGB, GREY))
    la = np.dstack([RGB[..., 0], GREY])
    expected = on_white(RGB[..., :1], GREY)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(la, "LA"))), expected)


def test_palettes_with_and_without_transparency():
    indices = (np.arange(36, dtype=np.uint8) % 4).reshape(6, 6)
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colors.ravel().tolist())
    np.testing.assert_array_equal(decode(encoded(image)), colors[indices])
    np.testing.assert_array_equal(decode(encoded(image, "GIF")), colors[indices])
    alpha = np.array([0, 255, 128, 255], dtype=np.uint8)
    expected = on_white(colors[indices], alpha[indices])
    np.testing.assert_array_equal(decode(encoded(image, transparency=alpha.tobytes())), expected)


def test_a_transparent_grey_value_or_colour_becomes_white():
    grey = np.where(GREY[0, 0] == GREY, 255, GREY)
    out = decode(encoded(Image.fromarray(GREY), transparency=int(GREY[0, 0])))
    np.testing.assert_array_equal(out[..., 0], grey)
    out = decode(encoded(Image.fromarray(RGB), transparency=tuple(map(int, RGB[0, 0]))))
    assert (out[0, 0] == 255).all()
    np.testing.assert_array_equal(out[1:], RGB[1:])


def test_16_bit_grey_is_scaled_and_not_clipped():
    wide = np.array([[0, 128, 129, 257], [385, 386, 32768, 65535]], dtype=np.uint16)
    expected = np.floor(wide / 257 + 0.5)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide), kind))[..., 0], expected)


def test_wider_than_16_bits_has_no_known_range():
    with pytest.raises(BadPicture, match="grey values from 0 to 70000"):
        decode(encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))
    with pytest.raises(BadPicture, match="floating-point"):
        decode(encoded(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF"))


def test_cmyk_jpeg_looks_as_it_should():
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    out = decode(encoded(image.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(out.astype(int) - (200, 30, 60)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """The table of the EXIF standard, tag 274: how the stored rows and columns lie in the picture seen."""
    seen = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: seen.transpose(1, 0, 2)[::-1],
        7: seen.transpose(1, 0, 2)[::-1, ::-1],
        8: seen.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    np.testing.assert_array_equal(decode(content), seen)


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"])
def test_no_beginning_of_a_file_passes_for_the_picture(kind):
    content = encoded(Image.fromarray(RGB), kind)
    whole = decode(content)
    for end in range(len(content)):
        try:
            part = decode(content[:end])
        except BadPicture:
            continue
        np.testing.assert_array_equal(part, whole)  # only a trailer was cut off


def test_no_flipped_byte_of_a_png_passes_unnoticed():
    content = encode_png(RGB)
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 0x55
        try:
            out = decode(bytes(damaged))
        except BadPicture:
            continue
        np.testing.assert_array_equal(out, RGB)


@settings(max_examples=150)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda start, rest: start + rest,
            st.sampled_from(
                [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\x20\0\0\0WEBP", b"P5 "]
            ),
            st.binary(max_size=200),
        ),
    )
)
def test_arbitrary_bytes_are_a_picture_or_a_reason(content):
    try:
        out = decode(content)
    except BadPicture:
        return
    assert out.dtype == np.uint8
    assert out.ndim == 3
    assert out.shape[2] in (1, 3)


def test_a_decompression_bomb_is_not_inflated():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadPicture, match="decompression bomb"):
        decode(bomb)


def test_a_file_of_another_kind_is_not_tried():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadPicture, match="not a picture"):
            decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(BadPicture, match="empty"):
        decode(b"")


def test_png_round_trip():
    np.testing.assert_array_equal(decode(encode_png(RGB)), RGB)
    np.testing.assert_array_equal(decode(encode_png(GREY[..., None]))[..., 0], GREY)


def test_block_means_round_half_up():
    blocks = np.array([[0, 1, 255, 255], [0, 1, 255, 254]], dtype=np.uint8)
    square = np.vstack([blocks, blocks])[..., None]
    np.testing.assert_array_equal(box_reduce(square, 2)[..., 0], [[1, 255], [1, 255]])
    np.testing.assert_array_equal(box_reduce(square, 4), square)
    with pytest.raises(ValueError, match="whole blocks"):
        box_reduce(square, 3)


def test_repeated_block_means_agree_where_they_are_exact():
    even = RNG.integers(0, 16, (3, 8, 8, 3)).astype(np.uint8) * 16
    np.testing.assert_array_equal(box_reduce(box_reduce(even, 4), 2), box_reduce(even, 2))


def test_grey_and_colour():
    np.testing.assert_array_equal(with_channels(GREY[..., None], 3), np.dstack([GREY] * 3))
    np.testing.assert_array_equal(with_channels(with_channels(GREY[..., None], 3), 1)[..., 0], GREY)
    luma = np.asarray(Image.fromarray(RGB).convert("L")).astype(int)
    assert np.abs(with_channels(RGB, 1)[..., 0] - luma).max() <= 1
