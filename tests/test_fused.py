"""The kernels for GPUs, by Triton's interpreter on the CPU, against PyTorch's operations; elsewhere the plain way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from imagewright import fused
from imagewright.networks.layers import group_norm

ANSWERS = """
import torch
from imagewright import fused, noise
cpu = torch.device("cpu")
assert fused._tried(cpu), "normalisation"
assert noise._drops_the_same.__wrapped__(cpu), "dropout"
x = torch.randn(2, 12, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last).float().requires_grad_()
learned = torch.rand(12, requires_grad=True), torch.rand(12, requires_grad=True)
found = []
for function in (fused.activated, fused.plain):
    (first,) = torch.autograd.grad(function(x, 3, *learned, 1e-5, silu=True).square().sum(), x, create_graph=True)
    found.append((first, torch.autograd.grad(first.square().sum(), learned[0])[0]))
torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_are_pytorch_s_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, gradients of gradients; in another process, as Triton chooses when it is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_cpu_has_no_use_for_them() -> None:
    x = torch.randn(2, 8, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    assert not fused.activates(x) and not fused.drops(x)


@pytest.mark.parametrize("told", [False, True])
def test_activated_is_norm_scale_shift_and_silu(told: bool) -> None:
    norm, x = group_norm(8, eps=1e-5), torch.randn(2, 8, 4, 4)
    scale, shift = torch.randn(2, 2, 8, 1, 1)
    expected = norm(x) * scale + shift if told else norm(x)
    found = norm.activated(x, scale, shift) if told else norm.activated(x)
    torch.testing.assert_close(found, torch.nn.functional.silu(expected))


def test_the_plain_way_is_the_fused_one_s_definition() -> None:
    norm, x = group_norm(8, eps=1e-5), torch.randn(2, 8, 4, 4)
    torch.nn.init.normal_(norm.weight)
    scale, shift = torch.randn(2, 2, 8, 1, 1)
    found = fused.plain(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, shift, silu=True)
    torch.testing.assert_close(found, norm.activated(x, scale, shift))
