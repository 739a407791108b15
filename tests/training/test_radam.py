"""RAdam by Adam's kernel against torch's own."""

from __future__ import annotations

import pytest
import torch

from imagewright.training.radam import FusedRAdam


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(step)
    return [torch.randn(3, 4), torch.randn(5) * 1e-4]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}])
def test_it_is_torch_s(settings: dict) -> None:
    """Weights and state over 20 steps with a changing rate, the first of which have no second moment."""
    runs, minded = [], []
    for kind in (torch.optim.RAdam, FusedRAdam):
        weights = [torch.ones(3, 4), torch.ones(5)]
        optimizer = kind(weights, foreach=True, **settings)
        for step in range(20):
            for weight, gradient in zip(weights, gradients(step), strict=True):
                weight.grad = gradient
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            if kind is FusedRAdam:
                minded.append(optimizer.minds)
            optimizer.step()
        runs.append([*weights, *(v for w in weights for v in optimizer.state[w].values())])
    assert minded == [False] * 5 + [True] * 15
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


def test_a_flag_stops_it() -> None:
    weight = torch.ones(3)
    optimizer = FusedRAdam([weight], lr=0.1, foreach=True)
    for step in range(8):
        weight.grad = torch.ones(3) if step < 6 else torch.full((3,), float("nan"))
        optimizer.found_inf = torch.tensor(float(step >= 6))
        before = weight.clone()
        optimizer.step()
        assert torch.equal(before, weight) == (step >= 6)


def test_a_group_without_gradients_holds_up_none() -> None:
    weight, idle = torch.ones(3), torch.ones(2)
    optimizer = FusedRAdam([{"params": [idle]}, {"params": [weight]}], lr=0.1, foreach=True)
    for _ in range(8):
        weight.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.minds and torch.equal(idle, torch.ones(2)) and not torch.equal(weight, torch.ones(3))


def later(grouped: bool) -> list[list[torch.Tensor]]:
    """Three weights after 14 steps, of which the second has no gradient in the first four and the third never one."""
    runs = []
    for kind in (torch.optim.RAdam, FusedRAdam):
        weights = [torch.ones(3) for _ in range(3)]
        first, late, idle = weights
        groups = [{"params": [first, idle], "lr": 0.1}, {"params": [late], "lr": 0.02}]
        optimizer = kind(groups if grouped else weights, lr=0.1, foreach=True)
        for step in range(14):
            torch.manual_seed(step)
            first.grad, late.grad = torch.randn(3), torch.randn(3) if step >= 4 else None
            optimizer.step()
        runs.append(weights)
    return runs


@pytest.mark.parametrize("grouped", [True, False])
def test_weights_that_begin_later_are_stepped_as_torch_s(grouped: bool) -> None:
    """In a group of their own, with its rate, and beside others."""
    for a, b in zip(*later(grouped), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)
