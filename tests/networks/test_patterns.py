"""Who sees whom: each pattern against its own mask, gradients, decoding; reachability; dense attention as a limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imagewright.networks.patterns import Dense, LookBack, Pattern, Window, mask
from imagewright.networks.sparse_patterns import Block, Split, Stride, Summary, Union

HEADS, LENGTH = 4, 27
PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "window": Window(5),
    "window of all": Window(40),
    "look back": LookBack(4),
    "block": Block(5),
    "stride": Stride(5),
    "summary": Summary(6, 2, HEADS),
    "strided, one head": Union(Window(5), Stride(5)),
    "fixed, one head": Union(Block(6), Summary(6, 2, HEADS)),
    "strided, heads": Split([Window(5), Stride(5)], [2, 2]),
    "fixed, heads": Split([Block(6), Summary(6, 2, 3)], [1, 3]),
}
EACH = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, LENGTH, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True) for _ in range(3)]


@EACH
def test_what_is_computed_in_blocks_is_attention_under_the_mask(pattern: Pattern) -> None:
    qkv = drawn()
    got, want = pattern(*qkv), F.scaled_dot_product_attention(*qkv, attn_mask=mask(pattern, HEADS, LENGTH))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got.sin().sum(), qkv), torch.autograd.grad(want.sin().sum(), qkv), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@EACH
def test_one_place_at_a_time_gives_the_same(pattern: Pattern) -> None:
    qkv, memory = drawn(), pattern.memory()
    steps = [pattern.step(*(t[:, :, i : i + 1] for t in qkv), memory, i, LENGTH) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, 2), pattern(*qkv), rtol=0, atol=1e-12)


@EACH
def test_every_place_sees_itself_and_nothing_later(pattern: Pattern) -> None:
    sees = mask(pattern, HEADS, LENGTH)
    assert sees.diagonal(dim1=1, dim2=2).all() and not sees.triu(1).any()


def test_two_patterns_reach_everything_before() -> None:
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def after(first: Pattern, second: Pattern) -> Tensor:
        """From where a place is reached by `first`, then `second`."""
        a, b = (mask(p, 1, LENGTH)[0].double() for p in (first, second))
        return (b @ a) > 0

    assert torch.equal(after(Window(5), Stride(5)), lower)
    summary = mask(Summary(6, 2, 1), 1, LENGTH)[0]
    assert torch.equal(after(Block(6), Summary(6, 2, 1)) | mask(Block(6), 1, LENGTH)[0] | summary, lower)
    assert not torch.equal(after(Window(5), Window(5)), lower)


def test_how_many_places_a_query_sees_grows_as_the_root() -> None:
    for side in (4, 16):
        strided = (
            mask(Window(side), 1, side * side)[0].sum(1).max() + mask(Stride(side), 1, side * side)[0].sum(1).max()
        )
        assert strided == 2 * side


def test_limits_are_dense_attention() -> None:
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for pattern in (Window(LENGTH), Stride(1), Block(LENGTH), Summary(LENGTH, LENGTH, 1)):
        assert torch.equal(mask(pattern, 1, LENGTH)[0], lower), pattern


def test_heads_sum_up_with_cells_of_their_own() -> None:
    sees = mask(Summary(6, 2, 3), 3, 12)[:, 11]
    assert [row.nonzero().flatten().tolist() for row in sees] == [[4, 5, 10, 11], [2, 3, 8, 9, 11], [0, 1, 6, 7, 11]]


def test_what_decoding_keeps_is_what_may_be_asked_for() -> None:
    for pattern, slots in ((Window(5), 5), (Block(5), 5), (LookBack(4), 8), (Summary(9, 2, 2), 6), (Dense(), LENGTH)):
        qkv, memory = drawn(), pattern.memory()
        pattern.step(*(t[:, :, :1] for t in qkv), memory, 0, LENGTH)
        assert memory.keys is not None and memory.keys.shape[2] == slots
