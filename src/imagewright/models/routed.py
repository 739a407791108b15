"""Several one-step generators as one: each image goes to the student that its class belongs to.

Source   Song et al. 2025 (arXiv 2410.23274), section 4.1: the route is a table of classes, and no network.
Memory   A model that was read from a file holds the students that the last call needed and no other: they are read when
         a class of theirs is asked for (`models.files`), so that a request of one class costs one student's memory.
Numbers  A student is given its images of a batch together; as in any other batch, sums may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.start_map import StartMap
from imagewright.types import UNCONDITIONAL, Condition, UserError

NOBODY = -1
"""In the table: no student knows the class."""
UNTOLD = "every image needs a class here: it says which student makes the image"


class RoutedMap(nn.Module):
    """A `FlowMap` to sigma_to = 0 of one-step generators of equal noise levels, and the student of each class.

    table: [classes], places in `students`, -1 where there is none. Raises UserError for students that are no
    `StartMap`s or of different levels, and for a table that names others or leaves one out.
    """

    kind = "flow_map"

    def __init__(self, students: Sequence[nn.Module], table: Sequence[int]) -> None:
        super().__init__()
        for student in students:
            if not isinstance(student, StartMap):
                raise UserError(f"a student is {an(type(student).__name__)}, which is no one-step generator")
        levels = {(s.sigma_min, s.sigma_max) for s in students if isinstance(s, StartMap)}
        if len(levels) != 1:
            raise UserError(f"students have noise levels {sorted(levels)}; there must be some, and of equal levels")
        if not all(isinstance(k, int) for k in table) or {*table} - {NOBODY} != {*range(len(students))}:
            raise UserError(f"the table of classes names students {[*table]}; there are {len(students)}")
        self.students, self.table = nn.ModuleList(students), tuple(table)
        ((self.sigma_min, self.sigma_max),) = levels
        self._read: Callable[[int], nn.Module] | None = None
        self._moves: list[Callable[[Tensor], Tensor]] = []

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for."""
        return len(self.table)

    def start(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `StartMap.start`. Raises UserError where an image has no class, or one that no student knows."""
        if cond.label is None:
            raise UserError(UNTOLD)
        routes = torch.tensor([*self.table, NOBODY]).to(cond.label.device)[cond.label]  # a label of -1 is nobody's
        needed = sorted({*routes.tolist()})
        if NOBODY in needed:
            label = int(cond.label[routes == NOBODY][0])
            raise UserError(f"no student makes images of class {label}" if label >= 0 else UNTOLD)
        self._hold(needed)
        answer = torch.empty_like(x)
        for k in needed:
            rows = (routes == k).nonzero()[:, 0]
            student: Any = self.students[k]
            answer[rows] = student.start(x[rows], sigma[rows], cond[rows])
        return answer

    def start_everywhere(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """`start` by asking every student for every image: the same function without a branch, for graphs.

        Classes that no student knows are the first one's.
        """
        self._hold(range(len(self.students)))
        assert cond.label is not None
        routes = torch.tensor(self.table, device=cond.label.device)[cond.label][:, None, None, None]
        first, *others = (student.start(x, sigma, cond) for student in self.students)  # type: ignore[operator]
        answer: Tensor = first
        for k, made in enumerate(others, 1):
            answer = torch.where(routes == k, made, answer)
        return answer

    def forward(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.FlowMap`; raises ValueError for a sigma_to other than 0 (on the CPU: no device is waited for)."""
        to = torch.as_tensor(sigma_to)
        if to.device.type == "cpu" and torch.any(to != 0):
            raise ValueError(f"{an(type(self).__name__)} only goes to sigma_to = 0")
        return self.start(x, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The identity."""
        return torch.as_tensor(sigma)

    def describe(self) -> dict[str, Any]:
        """As of any model; "students" is a list of descriptions."""
        students: list[Any] = [student.describe() for student in self.students]  # type: ignore[operator]
        return {"class": type(self).__name__, "students": students, "table": list(self.table)}

    def read_by(self, read: Callable[[int], nn.Module]) -> Self:
        """The same, of students without memory (on torch's meta device), which `read` gives when they are needed."""
        self._read = read
        return self

    def held(self) -> list[int]:
        """Which students are in memory."""
        return [k for k, student in enumerate(self.students) if not next(student.parameters()).is_meta]

    def _hold(self, needed: Sequence[int]) -> None:
        """Have these students in memory and, where the others can be read again, no other."""
        if self._read is None:
            return
        for k in {*self.held()} - {*needed}:
            self.students[k] = self.students[k].to("meta")
        for k in {*needed} - {*self.held()}:
            student = self._read(k).train(self.training)
            for move in self._moves:
                student._apply(move)  # type: ignore[no-untyped-call]
            self.students[k] = student

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of all students, which are all read."""
        self._hold(range(len(self.students)))
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what is in memory, and what will be."""
        if self._read is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        self._moves.append(fn)
        for k in self.held():
            self.students[k]._apply(fn)  # type: ignore[no-untyped-call]
        return self
