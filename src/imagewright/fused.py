"""What a U-Net's block does between its convolutions, in few passes over a GPU's memory: `kernels`, differentiable.

Group normalisation, what it is scaled and shifted by, and SiLU are one, in half precision with channels last: PyTorch's
own kernel knows images plane by plane alone, so that a network whose convolutions want channels last copies every input
and output of it, 87 ms in an ADM step of 332 on an H200. Dropout makes its random numbers where it needs them.

Where triton is missing, or its numbers are not PyTorch's, and within other derivatives than a plain backward, callers
take PyTorch's way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

ROWS, BLOCK = 32, 64
"""Pixels and channels of one tile; 64 numbers of 16 bits are one line of the cache."""
SHARE = 512
"""Pixels that one program sums over."""
QUADS = 8
"""Fours of pixels in one tile of dropout."""


def activates(x: Tensor) -> bool:
    """Whether `activated` can stand for PyTorch's operations on x."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and _runs(x)


def drops(h: Tensor) -> bool:
    """Whether `dropped` can stand for PyTorch's operations on h."""
    if h.ndim != 4 or not _runs(h):
        return False
    pixels = h.shape[2] * h.shape[3]  # a word decides on four numbers, and no kernel cuts it
    return (_last(h) and pixels % 4 == 0) or (h.is_contiguous() and h.shape[1] * pixels % 4 == 0)


def _runs(x: Tensor) -> bool:
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad.unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]
        and _agrees(x.device)
    )


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _there(x: Tensor) -> AbstractContextManager[Any]:
    """Within it x's device is the current one, on which Triton launches whatever its tensors'."""
    there: AbstractContextManager[Any] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return there


def dropped(h: Tensor, p: float, key: int | Tensor, places: range) -> Tensor:
    """h [N, C, H, W] with dropout, by the numbers of `noise.BatchNoise`: the draw's key and the images' places."""
    with _there(h):
        out: Tensor = _Dropped.apply(h, p, key, places)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, p: float, key: int | Tensor, places: range) -> Tensor:
        from imagewright import kernels

        ctx.settings = p, key, places
        n, last = len(h), _last(h) and h.shape[2] * h.shape[3] % 4 == 0
        ctx.last = last
        y, channels, quads = torch.empty_like(h), h.shape[1] if last else 1, h[0, :1].numel() if last else h[0].numel()
        quads //= 4
        grid = (-(-channels // BLOCK), -(-quads // QUADS), n) if last else (1, -(-quads // (QUADS * BLOCK)), n)
        kernels.dropped[grid](
            h, y, key, places.start, round(p * 2**16) - 2**15, 1 / (1 - p), len(places), channels, quads,
            isinstance(key, Tensor), last, QUADS, BLOCK,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy.contiguous(memory_format=torch.channels_last if ctx.last else torch.contiguous_format)
        return dropped(dy, *ctx.settings), None, None, None


def activated(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool,
) -> Tensor:
    """x [N, C, H, W], channels last, normalised by groups, times scale plus shift [N or 1, C, 1, 1], through SiLU."""
    if scale is not None and shift is not None:  # the kernels read a row for every image
        scale, shift = (told.expand(len(x), -1, -1, -1) for told in (scale, shift))
    with _there(x):
        out: Tensor = _Activated.apply(x, weight, bias, scale, shift, groups, eps, silu)  # type: ignore[no-untyped-call]
    return out


def plain(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool,
) -> Tensor:
    """The same by PyTorch's operations."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        h = F.group_norm(x, groups, weight, bias, eps)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift, h, scale)
        return F.silu(h) if silu else h


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        from imagewright import kernels

        n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        splits, size = -(-pixels // SHARE), channels // groups
        parts, stats = torch.empty(n, splits, 2, channels, device=x.device), torch.empty(2, n, groups, device=x.device)
        coefficients = torch.empty(2, n, channels, device=x.device)
        blocks = -(-channels // BLOCK)
        kernels.sums[blocks, splits, n](x, parts, pixels, channels, min(SHARE, pixels), splits, ROWS, BLOCK)
        kernels.normalisation[n, groups](
            parts, _or(weight, x), _or(bias, x), _or(scale, x), _or(shift, x), coefficients, stats, _step(scale),
            _step(shift), pixels, channels, groups, eps, splits, size, _padded(size), weight is not None,
            scale is not None, num_warps=1,
        )  # fmt: skip
        y = torch.empty_like(x)
        kernels.applied[blocks, -(-pixels // ROWS), n](x, coefficients, y, pixels, channels, silu, ROWS, BLOCK)
        ctx.save_for_backward(x, weight, bias, scale, shift, coefficients, stats)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from imagewright import kernels

        x, weight, bias, scale, shift, coefficients, stats = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        if torch.is_grad_enabled():  # to be differentiated again
            given = (x, weight, bias, scale, shift)
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            again = plain(x, groups, weight, bias, eps, scale, shift, silu=silu)
            found = iter(torch.autograd.grad(again, wanted, dy, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None, None)
        dy = dy.contiguous(memory_format=torch.channels_last)
        n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        splits, size, blocks = -(-pixels // SHARE), channels // groups, -(-channels // BLOCK)
        parts, by_x = torch.empty(n, splits, 2, channels, device=x.device), torch.empty(2, n, channels, device=x.device)
        gradients = torch.empty(4, n, channels, device=x.device)
        kernels.back_sums[blocks, splits, n](
            x, dy, coefficients, parts, pixels, channels, min(SHARE, pixels), silu, splits, ROWS, BLOCK
        )
        kernels.back_normalisation[n, groups](
            parts, stats, _or(weight, x), _or(bias, x), _or(scale, x), gradients, by_x, _step(scale), pixels, channels,
            groups, splits, size, _padded(size), weight is not None, scale is not None, num_warps=1,
        )  # fmt: skip
        dx = torch.empty_like(x)
        kernels.back_applied[blocks, -(-pixels // ROWS), n](
            x, dy, coefficients, by_x, dx, pixels, channels, silu, ROWS, BLOCK
        )
        dweight, dbias = gradients[2:].sum(1) if weight is not None else (None, None)
        told = [None if t is None else gradients[i].to(t.dtype).view(t.shape) for i, t in enumerate((scale, shift))]
        sums = (None if t is None else t.to(p.dtype) for t, p in ((dweight, weight), (dbias, bias)))
        return (dx, *sums, *told, None, None, None)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read, where there is none."""
    return other if tensor is None else tensor


def _step(tensor: Tensor | None) -> int:
    """From one image's numbers to the next one's."""
    return 0 if tensor is None else tensor.stride(0)


def _padded(size: int) -> int:
    """The next power of two, which Triton's ranges have to be."""
    return 1 << (size - 1).bit_length()


@lru_cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernels run here and say what PyTorch's say: tried once on small images."""
    try:
        return _tried(device)
    except Exception:  # whatever a compiler that is not there, or not whole, raises
        return False


@torch.inference_mode(False)
@torch.enable_grad()
def _tried(device: torch.device) -> bool:
    x, other = (torch.arange(2 * 24 * 35, device=device).add(i).mul(0.7).sin().view(2, 24, 5, 7) for i in (0, 5))
    told = torch.linspace(0.5, 1.5, 96, device=device).view(2, 48, 1, 1).chunk(2, dim=1)
    learned = [torch.linspace(0.5, 2, 24, device=device), torch.linspace(-1, 1, 24, device=device)]
    answers = []
    for function in (activated, plain):
        given = [x.contiguous(memory_format=torch.channels_last), *learned, *told]
        given = [t.detach().bfloat16() if i not in (1, 2) else t.detach() for i, t in enumerate(given)]
        given = [t.requires_grad_() for t in given]
        images, weight, bias, scale, shift = given
        y = function(images, 4, weight, bias, 1e-5, scale, shift, silu=True)
        answers.append((y, *torch.autograd.grad((y.float() * other).sum(), given)))
    return all(
        torch.linalg.vector_norm(a.float() - b.float()) <= 0.02 * torch.linalg.vector_norm(b.float())
        for a, b in zip(*answers, strict=True)
    )
