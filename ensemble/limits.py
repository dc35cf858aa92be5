"""What a blend may have at most: members, time, bytes.

Takes what each member costs and the budgets; tells which supports and members are within them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Support = tuple[int, ...]
"""Members, ascending."""


@dataclass(frozen=True, eq=False)
class Limits:
    """What a blend may have at most; a member costs the same whatever its weight is."""

    costs: NDArray[np.float64]
    """(R, M) of R resources, such as milliseconds per image and bytes."""
    budgets: NDArray[np.float64]
    """(R,) at most so much of each."""
    max_members: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether there is any limit at all."""
        return self.max_members is not None or bool(np.isfinite(self.budgets).any())

    def admit(self, support: Support) -> bool:
        within = self.costs[:, list(support)].sum(axis=1) <= self.budgets * (1 + 1e-12)
        return bool(within.all()) and len(support) <= (self.max_members or len(support))

    def room(self, support: Support) -> NDArray[np.bool_]:
        """(M,): which members may be added to the support; not those that are in it."""
        sums = self.costs[:, list(support)].sum(axis=1, keepdims=True) + self.costs
        fits: NDArray[np.bool_] = (sums <= self.budgets[:, None] * (1 + 1e-12)).all(axis=0)
        fits[list(support)] = False
        return fits & (self.max_members is None or len(support) < self.max_members)

    def share(self, members: NDArray[np.intp]) -> NDArray[np.float64]:
        """(m,): the largest part of any budget that each member takes."""
        parts = self.costs[:, members] / np.maximum(self.budgets, 1e-300)[:, None]
        most: NDArray[np.float64] = parts.max(axis=0) if len(parts) else np.zeros(len(members))
        return np.asarray(
            np.maximum(most, 0.0 if self.max_members is None else 1.0 / self.max_members)
        )

    def within(self, resource: int, budget: float) -> Limits:
        """The same with another budget for one resource."""
        budgets = self.budgets.copy()
        budgets[resource] = budget
        return replace(self, budgets=budgets)
