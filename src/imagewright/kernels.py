"""Kernels in Triton's language for GPUs: what PyTorch's own do in many passes over memory.

Images lie channels last: pixel by pixel, [N, P, C]. Everything is summed in float32. Programs that follow each other
read what lies side by side: channels change first, then pixels, then images. Import it only where triton is.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, n, row, c, pixels, channels):
    """Numbers of an image at some pixels and channels, float32 [rows, channels of the block]; 0 beyond the ends."""
    inside = (row < pixels)[:, None] & (c < channels)[None, :]
    place = n * pixels * channels + row[:, None].to(tl.int64) * channels + c[None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32), place, inside


@triton.jit
def _numbers(x, n, row, c, pixels, channels):
    """Those of `_tile` alone."""
    v, _place, _inside = _tile(x, n, row, c, pixels, channels)
    return v


@triton.jit
def _slope(z):
    """Derivative of z sigmoid(z)."""
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def sums(x, out, pixels, channels, per, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and sums of squares over a share of the pixels, out [N, SPLITS, 2, C]."""
    n, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros([ROWS, BLOCK], tl.float32)
    second = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, per, ROWS):
        v = _numbers(x, n, split * per + i + tl.arange(0, ROWS), c, pixels, channels)
        first += v
        second += v * v
    base = out + (n * SPLITS + split) * 2 * channels + c
    tl.store(base, tl.sum(first, 0), mask=c < channels)
    tl.store(base + channels, tl.sum(second, 0), mask=c < channels)


@triton.jit
def normalisation(
    parts, weight, bias, scale, shift, out, stats, scale_stride, shift_stride, pixels, channels, groups, eps,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """From `sums`: what an image's channels are multiplied by and what is added, out [2, N, C]; stats [2, N, G]."""
    n, g, images = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    k = tl.arange(0, PADDED)
    c, inside = g * SIZE + k, k < SIZE
    first = tl.zeros([PADDED], tl.float32)
    second = tl.zeros([PADDED], tl.float32)
    for split in range(SPLITS):
        base = parts + (n * SPLITS + split) * 2 * channels + c
        first += tl.load(base, mask=inside, other=0.0)
        second += tl.load(base + channels, mask=inside, other=0.0)
    count = pixels * SIZE
    mean = tl.sum(first, 0) / count
    rstd = 1 / tl.sqrt(tl.maximum(tl.sum(second, 0) / count - mean * mean, 0.0) + eps)
    tl.store(stats + n * groups + g, mean)
    tl.store(stats + (images + n) * groups + g, rstd)
    factor = tl.zeros([PADDED], tl.float32) + rstd
    added = tl.zeros([PADDED], tl.float32)
    if WEIGHTED:
        factor *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        added += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    added -= mean * factor
    if SCALED:
        by = tl.load(scale + n * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
        factor *= by
        added = added * by + tl.load(shift + n * shift_stride + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * channels + c, factor, mask=inside)
    tl.store(out + (images + n) * channels + c, added, mask=inside)


@triton.jit
def applied(x, coefficients, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = silu(factor x + added), of coefficients [2, N, C]."""
    n, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, place, inside = _tile(x, n, tl.program_id(1) * ROWS + tl.arange(0, ROWS), c, pixels, channels)
    factor = tl.load(coefficients + n * channels + c, mask=c < channels, other=0.0)
    added = tl.load(coefficients + (images + n) * channels + c, mask=c < channels, other=0.0)
    z = v * factor[None, :] + added[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + place, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def back_sums(
    x, dy, coefficients, out, pixels, channels, per,
    SILU: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of dz, and of dz x, over a share of the pixels, where y = silu(z); out [N, SPLITS, 2, C]."""
    n, split, images = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(coefficients + n * channels + c, mask=c < channels, other=0.0)
    added = tl.load(coefficients + (images + n) * channels + c, mask=c < channels, other=0.0)
    first = tl.zeros([ROWS, BLOCK], tl.float32)
    second = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, per, ROWS):
        row = split * per + i + tl.arange(0, ROWS)
        v = _numbers(x, n, row, c, pixels, channels)
        d = _numbers(dy, n, row, c, pixels, channels)
        if SILU:
            d = d * _slope(v * factor[None, :] + added[None, :])
        first += d
        second += d * v
    base = out + (n * SPLITS + split) * 2 * channels + c
    tl.store(base, tl.sum(first, 0), mask=c < channels)
    tl.store(base + channels, tl.sum(second, 0), mask=c < channels)


@triton.jit
def back_normalisation(
    parts, stats, weight, bias, scale, out, by_x, scale_stride, pixels, channels, groups,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """From `back_sums`: gradients of scale, shift, weight and bias by image, out [4, N, C].

    by_x [2, N, C]: what the gradient of x has beside factor dz, as a multiple of x and a constant.
    """
    n, g, images = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    k = tl.arange(0, PADDED)
    c, inside = g * SIZE + k, k < SIZE
    first = tl.zeros([PADDED], tl.float32)
    second = tl.zeros([PADDED], tl.float32)
    for split in range(SPLITS):
        base = parts + (n * SPLITS + split) * 2 * channels + c
        first += tl.load(base, mask=inside, other=0.0)
        second += tl.load(base + channels, mask=inside, other=0.0)
    mean, rstd = tl.load(stats + n * groups + g), tl.load(stats + (images + n) * groups + g)
    second = rstd * (second - mean * first)  # of dz times the normalised x
    w = tl.zeros([PADDED], tl.float32) + 1
    b = tl.zeros([PADDED], tl.float32)
    by = tl.zeros([PADDED], tl.float32) + 1
    if WEIGHTED:
        w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        by = tl.load(scale + n * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
    base = out + n * channels + c
    step = images * channels
    tl.store(base, w * second + b * first, mask=inside)
    tl.store(base + step, first, mask=inside)
    tl.store(base + 2 * step, by * second, mask=inside)
    tl.store(base + 3 * step, by * first, mask=inside)
    count = pixels * SIZE
    m1 = tl.sum(w * by * first, 0) / count
    m2 = tl.sum(w * by * second, 0) / count
    multiple = tl.zeros([PADDED], tl.float32) - rstd * rstd * m2
    tl.store(by_x + n * channels + c, multiple, mask=inside)
    tl.store(by_x + (images + n) * channels + c, -rstd * m1 - multiple * mean, mask=inside)


@triton.jit
def back_applied(
    x, dy, coefficients, by_x, dx, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = factor dz + multiple x + constant."""
    n, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    v, place, inside = _tile(x, n, row, c, pixels, channels)
    d = _numbers(dy, n, row, c, pixels, channels)
    here, there = n * channels + c, (images + n) * channels + c
    factor = tl.load(coefficients + here, mask=c < channels, other=0.0)
    added = tl.load(coefficients + there, mask=c < channels, other=0.0)
    multiple = tl.load(by_x + here, mask=c < channels, other=0.0)
    constant = tl.load(by_x + there, mask=c < channels, other=0.0)
    if SILU:
        d = d * _slope(v * factor[None, :] + added[None, :])
    d = factor[None, :] * d + multiple[None, :] * v + constant[None, :]
    tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _shifted(word, BY: tl.constexpr):
    """A logical shift to the right of int64."""
    return (word >> BY) & ((1 << (64 - BY)) - 1)


@triton.jit
def _mixed(word):
    """`noise._mixed`."""
    word = (word ^ _shifted(word, 30)) * -4658895280553007687
    word = (word ^ _shifted(word, 27)) * -7723592293110705685
    return word ^ _shifted(word, 31)


@triton.jit(do_not_specialize=["key", "first", "least"])
def dropped(
    h, y, key, first, least, factor, places, channels, quads,
    STORED: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = h times factor where `BatchNoise.kept` lets through, else 0.

    LAST: channels lie last in both, and a word decides on four pixels next to each other, of `quads` fours; else it
    does on four numbers next to each other, and there is one channel. A word is made once, and nothing is divided but
    the image's own number: on a GPU a division of 64 bits takes longer than all else here. key: a number, or where it
    is STORED. first: the place of the first image, of `places` in each block; least: of the 16 bits, signed, that pass.
    """
    GOLDEN: tl.constexpr = -7046029254386353131
    n = tl.program_id(2)
    seed = tl.load(key) if STORED else key
    start = _mixed((n % places + first).to(tl.int64) * GOLDEN + seed)
    start = _mixed(start + (n // places).to(tl.int64) * GOLDEN)
    base = n.to(tl.int64) * channels * quads * 4
    if LAST:
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        g = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = (g < quads)[:, None] & (c < channels)[None, :]
        word = _mixed(start + (c.to(tl.int64)[None, :] * quads + g[:, None] + 1) * GOLDEN)
        at = base + g[:, None].to(tl.int64) * 4 * channels + c[None, :]
        for j in tl.static_range(4):
            _passed(h, y, at + j * channels, inside, word >> (16 * j), least, factor)
    else:
        g = (tl.program_id(1) * ROWS * BLOCK + tl.arange(0, ROWS * BLOCK)).to(tl.int64)
        j = tl.arange(0, 4)
        word = _mixed(start + (g + 1) * GOLDEN)
        at = base + g[:, None] * 4 + j[None, :]
        _passed(h, y, at, (g < quads)[:, None] & (j < 4)[None, :], word[:, None] >> (16 * j)[None, :], least, factor)


@triton.jit
def _passed(h, y, at, inside, word, least, factor):
    """What of h the lowest 16 bits of the words let through, into y."""
    sixteen = ((word & 0xFFFF) ^ 0x8000).to(tl.int32) - 0x8000
    value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(y + at, tl.where(sixteen >= least, value, 0.0).to(y.dtype.element_ty), mask=inside)
