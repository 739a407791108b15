"""The selective scan of a state-space model: a linear recurrence along a sequence, whose steps the sequence decides.

Source   Gu & Dao 2023 (Mamba, arXiv 2312.00752), algorithm 2: a zero-order hold for A, Euler's rule for B.
Memory   grows linearly with the length: states are not kept for backward but computed again, as the released kernel
         does. Products of decays lie in (0, 1], so nothing overflows, however long the sequence.
Speed    on a CPU place after place; elsewhere in chunks of about sqrt(L) places, all chunks at once, and then what
         enters each chunk: 2 sqrt(L) kernels follow each other instead of L, for twice the work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def selective_scan(
    u: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, chunk: int | None = None
) -> Tensor:
    """y_k = c_k . h_k + skip u_k of h_k = exp(step_k rate) h_(k-1) + step_k u_k b_k, h_(-1) = 0.

    u, step: [L, N, E], step > 0; rate: [E, S], < 0; b, c: [L, N, S]; skip: [E]; all of one dtype, float32 or wider.
    chunk: places done one after the other; None = all on a CPU, elsewhere sqrt(L). Returns [L, N, E].
    """
    places = chunk or (len(u) if u.device.type == "cpu" else math.isqrt(len(u) - 1) + 1)
    answer: Tensor = _Scan.apply(u, step, rate, b, c, places)  # type: ignore[no-untyped-call]
    return torch.addcmul(answer, u, skip)


def recurrence(decay: Tensor, added: Tensor, chunk: int, *, backwards: bool = False) -> Tensor:
    """h_k = decay_k h_(k-1) + added_k along the first axis, h_(-1) = 0; shapes [L, ...]. `added` may be overwritten.

    backwards: h_k = decay_(k+1) h_(k+1) + added_k, from the end.
    """
    length = len(added)
    chunk = min(chunk, length)
    short = -length % chunk
    if short:
        decay, added = (torch.cat([t, t.new_zeros(short, *t.shape[1:])]) for t in (decay, added))
    shape = (-1, chunk, *added.shape[1:])
    h, decay = added.view(shape), decay.reshape(shape)
    if backwards:
        for k in range(chunk - 2, -1, -1):
            h[:, k].addcmul_(decay[:, k + 1], h[:, k + 1])
        since = decay.flip(1).cumprod(1).flip(1) if len(h) > 1 else decay
        for i in range(len(h) - 2, -1, -1):
            entering = decay[i + 1, 0] * h[i + 1, 0]
            h[i, :-1].addcmul_(since[i, 1:], entering)
            h[i, -1].add_(entering)
    else:
        for k in range(1, chunk):
            h[:, k].addcmul_(decay[:, k], h[:, k - 1])
        since = decay.cumprod(1) if len(h) > 1 else decay
        for i in range(1, len(h)):
            h[i].addcmul_(since[i], h[i - 1, -1])
    return added[:length]


class _Scan(torch.autograd.Function):
    """c_k . h_k; h is computed again for backward, where it is followed by the same recurrence from the end."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(u, step, rate, b, c)
        ctx.chunk = chunk
        h = recurrence(_decay(step, rate), (step * u)[..., None] * b[:, :, None], chunk)
        return (h @ c[..., None])[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, step, rate, b, c = ctx.saved_tensors
        decay, entering = _decay(step, rate), step * u
        h = recurrence(decay, entering[..., None] * b[:, :, None], ctx.chunk)
        grad_c = (grad[:, :, None] @ h)[:, :, 0]
        back = recurrence(decay, grad[..., None] * c[:, :, None], ctx.chunk, backwards=True)  # dy / dh_k
        grad_b = (entering[:, :, None] @ back)[:, :, 0]
        grad_entering = (back @ b[..., None])[..., 0]
        exponent = back.mul_(decay)  # by the exponent of the decay, step x rate
        exponent[1:].mul_(h[:-1])
        exponent[0].zero_()
        grad_rate = torch.einsum("lnes,lne->es", exponent, step)
        grad_step = grad_entering * u + exponent.mul_(rate).sum(3)
        return grad_entering * step, grad_step, grad_rate, grad_b, grad_c, None


def _decay(step: Tensor, rate: Tensor) -> Tensor:
    """exp(step rate), [L, N, E, S]."""
    return (step[..., None] * rate).exp_()
