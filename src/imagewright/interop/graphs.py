"""A model as a graph that needs none of this package: ONNX, and torch.export's own format.

denoiser     (x [N, C, H, W], sigma [N], label [N]) -> the estimate of x0
generator    (noise [N, C, H, W] of variance 1, label [N]) -> an image, in one call: consistency and trajectory models,
             and one-step generators; of several students behind one table of classes all are asked, and one is heard
A model without classes has no input `label`; -1 is no class. N is free, all else is fixed; float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.files import replacing
from imagewright.models.discrete_latents import LatentDenoiser
from imagewright.models.preconditioning import Preconditioned
from imagewright.models.routed import RoutedMap
from imagewright.models.segments import MultistepConsistencyModel
from imagewright.models.self_conditioned import is_self_conditioned
from imagewright.models.start_map import StartMap
from imagewright.models.trajectory import TrajectoryModel
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

TOLERANCE = 1e-4
"""How far the answers of an ONNX file may lie from the model's."""


class _Denoiser(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        answer: Tensor = self.model(x, sigma, UNCONDITIONAL if label is None else Condition(label=label))
        return answer


class _OneStep(nn.Module):
    def __init__(self, model: StartMap | TrajectoryModel | RoutedMap) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        cond = UNCONDITIONAL if label is None else Condition(label=label)
        sigma = torch.full_like(noise[:, 0, 0, 0], self.model.sigma_max)
        start = noise * self.model.sigma_max
        if isinstance(self.model, TrajectoryModel):
            return self.model(start, sigma, torch.zeros_like(sigma), cond)  # type: ignore[no-any-return]
        if isinstance(self.model, RoutedMap):
            return self.model.start_everywhere(start, sigma, cond)
        return self.model.start(start, sigma, cond)


def _graph(model: nn.Module, spec: DataSpec) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The function to write, inputs to write it with, and which of their sizes are free."""
    if is_self_conditioned(model):
        raise UserError(
            f"a self-conditioned {type(model).__name__} is shown its own answers; it has no graph of one call"
        )
    if isinstance(model, LatentDenoiser):
        raise UserError("this denoiser draws its discrete latents before it is asked; it has no graph of one call")
    if isinstance(model, StartMap | TrajectoryModel | RoutedMap):
        wrapped: nn.Module = _OneStep(model)
    elif isinstance(model, Preconditioned) and not isinstance(model, MultistepConsistencyModel):
        wrapped = _Denoiser(model)
    else:
        raise UserError(
            f"{an(type(model).__name__)} is no denoiser and no one-step generator; it has no graph of one call"
        )
    shape = (2, spec.channels, spec.resolution, spec.resolution)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(shape, generator=generator)
    inputs = {"noise": picture} if isinstance(wrapped, _OneStep) else {"x": picture, "sigma": torch.tensor([0.5, 2.0])}
    if spec.num_classes:
        inputs["label"] = torch.tensor([0, spec.num_classes - 1])
    n = torch.export.Dim("n", min=1, max=4096)
    return wrapped.eval(), inputs, {name: {0: n} for name in inputs}


def _exported(model: nn.Module, spec: DataSpec) -> tuple[torch.export.ExportedProgram, dict[str, Tensor], Tensor]:
    wrapped, inputs, free = _graph(model, spec)
    with torch.no_grad():
        answer = wrapped(**inputs)
        program = torch.export.export(wrapped, (), inputs, dynamic_shapes=free)
    return program, inputs, answer


def write_program(path: Path, model: nn.Module, spec: DataSpec) -> None:
    """Write a `.pt2` that `torch.export.load` reads. Raises UserError for a model that has no such graph."""
    program, _, _ = _exported(model, spec)
    with replacing(path) as aside, aside.open("wb") as file:
        torch.export.save(program, file)


def write_onnx(path: Path, model: nn.Module, spec: DataSpec) -> float:
    """Write an ONNX file, run it with onnxruntime, and return the largest difference from the model's answers.

    Raises UserError for a model that has no such graph, without the extra "onnx", and where the answers differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, what torch.onnx needs
    except ImportError:
        raise UserError("ONNX files are written and checked with an extra: pip install 'imagewright[onnx]'") from None
    program, inputs, answer = _exported(model, spec)
    written = torch.onnx.export(program, (), kwargs=inputs, dynamo=True, verbose=False)
    assert written is not None
    with replacing(path) as aside:
        written.save(str(aside))
        session = onnxruntime.InferenceSession(str(aside), providers=["CPUExecutionProvider"])
        given = dict(zip((i.name for i in session.get_inputs()), (t.numpy() for t in inputs.values()), strict=True))
        (found,) = session.run(None, given)
        difference = float(np.abs(found - answer.numpy()).max())
        if not difference <= TOLERANCE * max(1.0, float(answer.abs().max())):
            raise UserError(f"onnxruntime answers otherwise than the model, by {difference:.2g}; nothing was written")
    return difference
