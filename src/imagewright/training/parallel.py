"""How the processes of a run hold its parts and add up their gradients: each process all of a part, or a share of it.

replicate  Every process has the whole part. Gradients travel in buckets while backward goes on, as DDP's do. DDP itself
           does not fit: it wraps one module with one forward, while methods call theirs by several names, as often as
           they like between two updates, and an update gives gradients to one part of several that were passed through.
shard      PyTorch's `fully_shard` (FSDP2) over each of a part's `networks.recompute.Block`s, frozen ones too: a process
           has some rows of each tensor, of its moments and of its averages, and all of a block while that computes.
           What lies outside of blocks (a few per cent) stays whole, as do parts without any.

With gradient accumulation nothing travels before a step's last micro-batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imagewright.gathering import told_as_lost
from imagewright.networks.recompute import Block, blocks
from imagewright.precision import wide
from imagewright.training.distributed import Processes
from imagewright.training.shares import Rows, Share, rows_of
from imagewright.types import UserError

BUCKET = 25 << 20
"""Bytes of gradients that travel together."""


class Whole:
    """A part of which this process has everything.

    state: the tensors of its state dict as this process has them. weights: those of them that are trained, as an
    optimiser is given them. leaves: the tensors to which backward gives gradients.
    local: this process's rows of tensors that are sharded, by name.
    """

    def __init__(
        self, module: nn.Module, processes: Processes, local: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.module, self.processes, self.local = module, processes, local
        self.state: dict[str, Tensor] = {n: local.get(n, v).detach() for n, v in module.state_dict().items()}
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # What is empty here, of fewer rows than processes, is not to be moved.
        self.weights: dict[str, Tensor] = {n: local.get(n, p) for n, p in trained.items() if self.state[n].numel()}
        self.leaves: list[Tensor] = [p for n, p in trained.items() if n not in local]
        self._buckets = Buckets(self.leaves, processes)
        self._written: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers() if processes.world > 1 else ():
            self._written.setdefault(buffer.dtype, []).append(buffer)

    def begin(self) -> None:
        """To be called at the start of a step."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this loss's gradients; no other part receives any. last: of the step's micro-batches."""
        with self._buckets.leaving(last):
            torch.autograd.backward(loss, inputs=self.leaves)

    def gradients(self) -> list[Tensor]:
        """The gradients of `weights`, after the last `backward`: their sums over all processes."""
        self._buckets.arrive()
        return [p.grad for p in self.weights.values() if p.grad is not None]

    def norm(self) -> Tensor:
        """The norm of the whole part's gradient, [], after `gradients`."""
        found = [p.grad for p in self.weights.values() if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
        return norm

    def settle(self) -> None:
        """Give all processes the first one's buffers, which passes may have written: norms of batches, spectral."""
        for group in self._written.values():
            flat = torch.cat([b.flatten() for b in group])
            with told_as_lost():
                dist.broadcast(flat, 0)
            for buffer, part in zip(group, torch.split(flat, [b.numel() for b in group]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def share(self, name: str, value: Tensor) -> Tensor | Share:
        """A tensor of the weight of that name (itself, a moment, an average) as a checkpoint is given it."""
        return value

    def mine(self, name: str, stored: Any) -> Any:
        """What this process has of a checkpoint's tensor of the weight of that name; what is no tensor stays."""
        return stored.whole() if isinstance(stored, Rows) else stored

    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of `state`, whole; what is sharded on the first process alone."""
        return dict(values)

    def copied(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A module of its own like the part's, with a whole state."""
        module = copy.deepcopy(self.module)
        module.load_state_dict(state)
        return module


class Sharded(Whole):
    """A part of whose blocks each process has some rows. Raises UserError where this torch cannot shard it."""

    def __init__(self, module: nn.Module, processes: Processes, found: Sequence[Block], device: torch.device) -> None:
        from torch.distributed.tensor import DTensor

        self._skeleton = skeleton(module)
        self._root: Any = _shard(found, device)
        parameters = dict(module.named_parameters())
        self._dtensors = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
        self._shapes = {n: tuple(p.shape) for n, p in self._dtensors.items()}
        with torch.no_grad():  # the shards stay in this memory from here on
            local = {n: p.to_local().detach() for n, p in self._dtensors.items()}
        super().__init__(module, processes, local)
        block: Any
        for block in found:
            block.unshard()  # torch keeps the objects that autograd sees from pass to pass
            self.leaves += [p for p in block.parameters() if p.requires_grad and p.ndim]
            block.reshard()
        self._forced = [
            (local[f"{name}.weight"], inner.forced)
            for name, inner in module.named_modules()
            if hasattr(inner, "forced") and f"{name}.weight" in self.weights and f"{name}.weight" in local
        ]

    def begin(self) -> None:
        """Weights that a network writes back in training (EDM2's) are written back here, row by row."""
        with torch.no_grad():
            for rows, forced in self._forced:
                rows.copy_(forced(rows))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)
        try:
            super().backward(loss, last=last)
        finally:
            self._root.set_requires_gradient_sync(False)  # other passes may go through this part

    def gradients(self) -> list[Tensor]:
        for name, parameter in self._dtensors.items():
            if name in self.weights and parameter.grad is not None:
                # Torch takes the mean over processes; losses are divided by the whole batch already.
                gradient: Any = parameter.grad
                self.weights[name].grad = gradient.to_local().mul_(self.processes.world)
            parameter.grad = None
        return super().gradients()

    def norm(self) -> Tensor:
        moved = {n: p.grad for n, p in self.weights.items() if p.grad is not None}
        device = next(iter(self.state.values())).device
        mine = _squared([g for n, g in moved.items() if n in self.local], device)
        alike = _squared([g for n, g in moved.items() if n not in self.local], device)
        return (self.processes.total(mine) + alike).sqrt().float()

    def share(self, name: str, value: Tensor) -> Tensor | Share:
        return Share(value, self._shapes[name]) if self._is_share(name, value) else value

    def _is_share(self, name: str, value: Tensor) -> bool:
        return name in self.local and value.shape == self.local[name].shape

    def mine(self, name: str, stored: Any) -> Any:
        if name not in self.local or not getattr(stored, "shape", ()):
            return super().mine(name, stored)
        return rows_of(stored, self.processes.rank, self.processes.world)

    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {n: self._collected(v, self._shapes[n]) if self._is_share(n, v) else v for n, v in values.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _collected(self, mine: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        each = mine.new_zeros(-(-shape[0] // self.processes.world), *shape[1:])
        each[: len(mine)] = mine
        shares = [torch.empty_like(each) for _ in range(self.processes.world)] if self.processes.is_first else None
        with told_as_lost():
            dist.gather(each, shares)
        return None if shares is None else torch.cat(shares)[: shape[0]]

    def copied(self, state: Mapping[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self._skeleton)
        module.load_state_dict(state, assign=True)
        return module


class Buckets:
    """Gradients that are summed over processes in groups, each sent off as soon as backward has made all of it."""

    def __init__(self, parameters: Sequence[Tensor], processes: Processes) -> None:
        self._groups = list(_groups(parameters)) if processes.world > 1 else []
        self._group_of = {id(p): i for i, group in enumerate(self._groups) for p in group}
        self._leaving = False
        self._missing: list[int] = []
        self._sent: list[tuple[Any, Tensor, list[Tensor]]] = []
        for group in self._groups:
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._made)  # type: ignore[no-untyped-call]

    @contextmanager
    def leaving(self, last: bool) -> Iterator[None]:
        """The backward pass within it is the one after which gradients are complete, or is not."""
        self._leaving, self._missing = last, [len(group) for group in self._groups]
        try:
            yield
        finally:
            self._leaving = False

    def arrive(self) -> None:
        """Return when every gradient is the sum over all processes."""
        while len(self._sent) < len(self._groups):
            self._send()
        for work, flat, gradients in self._sent:
            if work is not None:
                with told_as_lost():
                    work.wait()
                parts = torch.split(flat, [g.numel() for g in gradients])
                torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
        self._sent = []

    def _made(self, parameter: Tensor) -> None:
        if not self._leaving:
            return
        self._missing[self._group_of[id(parameter)]] -= 1
        # In one order in all processes, whatever order backward takes.
        while len(self._sent) < len(self._groups) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        gradients = [p.grad for p in self._groups[len(self._sent)] if p.grad is not None]
        if not gradients:
            self._sent.append((None, torch.empty(0), []))
            return
        flat = torch.cat([g.flatten() for g in gradients])
        with told_as_lost():
            self._sent.append((dist.all_reduce(flat, async_op=True), flat, gradients))


def hold(module: nn.Module, processes: Processes, device: torch.device, *, shard: bool) -> Whole:
    """A part as this process holds it."""
    found = [] if not shard or processes.world == 1 else [b for b in blocks(module) if _can_shard(b, module)]
    return Sharded(module, processes, found, device) if found else Whole(module, processes)


def _can_shard(block: Block, module: nn.Module) -> bool:
    """Whether nobody asks for its weights while it does not compute, and no other part has it."""
    asked = getattr(getattr(module, "network", module), "last_layer", None)
    free = all(p is not asked for p in block.parameters())
    return free and not any(hasattr(inner, "unshard") for inner in block.modules())


class _Root(nn.Module):
    """Blocks of one part: gives FSDP2 a root whose forward can be called, where methods call what they like."""

    def __init__(self, found: Sequence[Block]) -> None:
        super().__init__()
        self.found = nn.ModuleList(found)

    def forward(self) -> None:
        """Nothing."""


def _shard(found: Sequence[Block], device: torch.device) -> nn.Module:
    """Shard each block. Returns their root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in found:
        single = {p for p in block.parameters() if not p.ndim}  # which has no rows
        if single and "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError(
                f"--training.parallel shard: {type(block).__name__} needs a newer torch than {torch.__version__}"
            )
        fully_shard(block, mesh=mesh, **({"ignored_params": single} if single else {}))  # type: ignore[call-overload]
    root = _Root(found)
    fully_shard(root, mesh=mesh)
    root()  # settles who is the root
    return root


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without its parameters' numbers, on torch's meta device; buffers are there."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _groups(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one number type in groups of `BUCKET` bytes, the last first, as backward makes their gradients."""
    group: list[Tensor] = []
    for parameter in reversed(parameters):
        full = sum(p.nbytes for p in group) + parameter.nbytes > BUCKET
        if group and (full or parameter.dtype != group[0].dtype):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def _squared(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Sum of all squares, []; 0 of none."""
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=device)]
    return wide(torch.stack(list(norms))).square().sum()
