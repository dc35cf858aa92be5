"""Where one member's OOF rows come from: a run folder's trials, or a file made elsewhere.

Gives the two arrays that the derived matrix is made of, in the order of the scored rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.pool import Member


@dataclass(frozen=True, eq=False)
class OofSource:
    """One member before anything of it has been read or checked."""

    member: Member
    where: str
    """File or pattern of files, for messages."""
    fingerprint: str
    """Changes whenever the files change: what is derived from them is kept under it."""
    log_prob: Callable[[], NDArray[np.float32]]
    """(N, C) natural-log probabilities as stored, unchecked."""
    true_prob: Callable[[], NDArray[np.float32]]
    """(N,) probability of the true class as stored, unchecked."""
