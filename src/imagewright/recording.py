"""Work on a CUDA device recorded as one graph: done again by one launch instead of hundreds.

A recording that fails has to leave the process as it was, and PyTorch's does not: the stream that was recorded stays
the current one, its memory pool goes on collecting, and the device's generator, marked as being recorded, refuses
every later draw. So here a copy stands in for the generator meanwhile, and stream and pool are put back.

A copy between the host and the device has its address in the host's memory recorded, where something else lies when it
is done again, and PyTorch records it without a word where nobody waits for it. Work that has one is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[], None]


def recorded(work: Work, device: torch.device) -> Work:
    """What does `work` again whenever it is called; on a CUDA device by one launch. It has been done once before.

    Raises RuntimeError with the first cause where it cannot be recorded.
    """
    if device.type != "cuda":
        _watched(work)
        return work
    index = torch.cuda.current_device() if device.index is None else device.index
    current, stream = torch.cuda.current_stream(index), torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The stream on which it is recorded warms up as well: what autograd keeps of one pass belongs to its stream.
        with torch.cuda.stream(current), _stood_in(torch.cuda.default_generators[index]):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                _watched(work)
                work()  # what compiles, or chooses kernels, does so now
            current.wait_stream(stream)
            # Threads that decode and pin pictures go on meanwhile: only this one's calls may not wait.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
    except Exception as error:
        with suppress(AttributeError, RuntimeError):  # which raise where the pool was closed in order
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        raise RuntimeError(_first(error)) from error
    replay: Work = graph.replay
    return replay


def _watched(work: Work) -> None:
    """Do it. Raises RuntimeError where numbers travel between the host and a device."""
    with _Crossings() as crossings:
        work()
    if crossings.found:
        raise RuntimeError(f"numbers travel between the host and the device ({crossings.found[0]})")


class _Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names operations that read on the host and write on a device, or the other way round.

    A single number of the host in a device's sum is none of them: its value itself is recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        read = [t for t in read if copies or t.ndim or t.device.type != "cpu"]
        both = [*read, *(t for t in tree_leaves(answer) if isinstance(t, Tensor))]
        if len({t.device.type == "cpu" for t in both}) > 1:
            self.found.append(str(func))
        return answer


@contextmanager
def _stood_in(generator: torch.Generator) -> Iterator[None]:
    """While the body runs, a copy of the generator's state is in its place."""
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


def _first(error: BaseException) -> str:
    """In one line, what went wrong first: the end of a broken recording raises an error of its own over it."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
