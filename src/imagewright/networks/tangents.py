"""Forward-mode derivatives of what networks are made of, where PyTorch's own cost more than they have to.

A derivative along a direction takes the same layers' linear parts on the direction, so two forward passes and a little.
PyTorch convolves a third time, with weights that do not change; takes a normalisation apart into twenty passes over
memory; and scales and shifts in four. Values are the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from imagewright import fused


def has_tangent(x: object) -> bool:
    """Whether a Jacobian-vector product is being computed through x; not through what is no tensor."""
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """function(*at) and its derivative along a direction; neither can be differentiated again.

    The rules of this module are used; `torch.func.jvp`, whose results can be differentiated, knows its own alone.
    """
    with torch.no_grad(), forward_ad.dual_level():
        answer = function(*(_dual(x, v) for x, v in zip(at, along, strict=True)))
        value, change = _parts(answer)
    return value, torch.zeros_like(value) if change is None else change


class Conv2d(nn.Conv2d):
    """A convolution whose derivative is one more convolution."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        single = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return _linear(pointwise if single and on_rows(input) else super()._conv_forward, input, weight, bias)


def on_rows(x: Tensor) -> bool:
    """Whether pixels are rows of numbers on a GPU: what acts on each pixel is one matrix product, its bias included."""
    return x.is_cuda and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of x [N, C, H, W], channels last, as a matrix product; channels last."""
    n, _, height, width = x.shape
    y = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1), bias)
    return y.view(n, height, width, -1).permute(0, 3, 1, 2)


def convolved(x: Tensor, weight: Tensor, *, padding: int) -> Tensor:
    """x [N, C, H, W] with a weight of its own making."""
    return _linear(lambda x, w, b: F.conv2d(x, w, b, padding=padding), x, weight, None)


def _linear(convolve: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _by_rule(input):
        return convolve(input, weight, bias)
    x, dx = _parts(input)
    assert dx is not None
    return _dual(convolve(x, weight, bias), convolve(dx, weight, None))


class GroupNorm(nn.GroupNorm):
    """Group normalisation in two passes more for its derivative, in any memory format.

    In half precision its answer is so too, as in EDM's official networks; its sums are float32. Autocast
    would have all up to the next convolution in float32: twice the memory and its traffic.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _by_rule(input):
            return self._with_tangent(input)
        if has_tangent(input):
            input = input.contiguous()  # PyTorch's derivative knows no other format
        if fused.activates(input):
            return fused.activated(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)
        if input.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        weight, bias = (None if p is None else p.to(input.dtype) for p in (self.weight, self.bias))
        casts = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        with torch.autocast(input.device.type, enabled=False) if casts else nullcontext():
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)

    def activated(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """SiLU of the normalised x, or of that times scale plus shift [N, C, 1, 1]; in one where one is there."""
        if fused.activates(x):
            return fused.activated(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, silu=True)
        h = self(x)
        return F.silu(h if scale is None or shift is None else scaled(h, scale, shift))

    def _with_tangent(self, input: Tensor) -> Tensor:
        x, dx = _parts(input)
        assert dx is not None
        n, c, groups, size = *x.shape[:2], self.num_groups, x[0, 0].numel()
        x = x if x.device.type == "cpu" else x.contiguous()  # only the CPU's kernel knows channels last
        y, mean, rstd = torch.native_group_norm(x, self.weight, self.bias, n, c, size, groups, self.eps)
        over = tuple(range(2, x.ndim))
        # Of the direction: its mean, and its mean product with the normalised input; each [n, groups].
        share = 1 / (size * c // groups)
        m1 = dx.sum(over).view(n, groups, -1).sum(2) * share
        m2 = ((x * dx).sum(over).view(n, groups, -1).sum(2) * share - mean * m1) * rstd
        scale = rstd if self.weight is None else rstd[:, :, None] * self.weight.view(groups, -1)
        scale = scale.view(n, groups, -1)
        by_x = -scale * (rstd * m2)[:, :, None]
        constant = -scale * m1[:, :, None] - by_x * mean[:, :, None]
        scale, by_x, constant = (v.expand(n, groups, c // groups).reshape(n, c, *(1,) * len(over))
                                 for v in (scale, by_x, constant))  # fmt: skip
        return _dual(y, torch.addcmul(torch.addcmul(constant, dx, scale), x, by_x))


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """shift + x * scale."""
    if not (_by_rule(x) and _by_rule(scale) and _by_rule(shift)):
        return torch.addcmul(shift, x, scale)
    (x, dx), (scale, dscale), (shift, dshift) = _parts(x), _parts(scale), _parts(shift)
    assert dx is not None and dscale is not None and dshift is not None
    return _dual(torch.addcmul(shift, x, scale), torch.addcmul(torch.addcmul(dshift, dx, scale), x, dscale))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v on [N, heads, T, C].

    PyTorch's fused kernels have no forward-mode derivative, so a Jacobian-vector product takes a plain way.
    """
    if not has_tangent(q):
        return F.scaled_dot_product_attention(q, k, v)
    if not _by_rule(q):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    (q, dq), (k, dk), (v, dv) = _parts(q), _parts(k), _parts(v)
    assert dq is not None and dk is not None and dv is not None
    factor = 1 / math.sqrt(q.shape[-1])
    shares = ((q * factor) @ k.mT).softmax(-1)
    moved = ((dq * factor) @ k.mT).add_((q * factor) @ dk.mT).mul_(shares)
    out = shares @ v
    change = (moved @ v).add_(shares @ dv).sub_(moved.sum(-1, keepdim=True) * out)
    return _dual(out, change)


def _by_rule(x: Tensor) -> bool:
    """Whether a rule of this module applies: within `derivative`, not within functorch's transforms."""
    return has_tangent(x) and torch._C._functorch.peek_interpreter_stack() is None


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    value, change = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return value, change


def _dual(value: Tensor, change: Tensor) -> Tensor:
    both: Tensor = forward_ad.make_dual(value, change)  # type: ignore[no-untyped-call]
    return both
