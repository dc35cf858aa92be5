"""Shares of a GPU, by the memory that a fold trial of each backbone was measured to take.

Takes what was measured on each kind of GPU, gives the places where a backbone's trials may run, or
the problem that it fits nowhere. Pure arithmetic: no Ray, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from foldrace.core.errors import Problem, listing
from foldrace.run_folder.gpu_memory import GpuKind, TrialMemory
from foldrace.scheduling.nodes import Node
from foldrace.scheduling.room import UNITS, Place

MARGIN = 0.1
"""Part of its memory that a trial is given beside it: the allocator keeps blocks in other sizes
from trial to trial, and libraries take workspaces by the shapes that they meet."""
MOST = 8
"""Trials on one GPU at most: each has a CUDA context of its own, and so many keep a GPU busy."""
_GB = 1e9


def trials_on_a_gpu(taken: float, memory: float, cores: float) -> int:
    """Fold trials that share a GPU, at least one.

    `taken` of the `memory` (bytes) by each; `cores`: the trials for which the node has cores, for
    each of its GPUs.
    """
    by_memory = int(memory // (taken * (1 + MARGIN))) if taken > 0 else MOST
    return max(1, min(by_memory, int(cores), MOST))


def share_of(trials: int) -> float:
    """The part of a GPU that each of so many trials reserves: together never more than all of it.

    Ray counts in parts of 1/10,000, and rounds.
    """
    return (UNITS // trials) / UNITS


def places(
    backbones: Iterable[str], kinds: Sequence[GpuKind], nodes: Sequence[Node], cpus: int
) -> dict[str, tuple[Place, ...]]:
    """Backbone -> where its trials may run, the smallest GPUs first, to leave the others free.

    Kinds of GPUs on which its batches do not fit in one piece are left out, if others are there.
    Where it was not measured it has a whole GPU. `cpus` of a trial.
    """
    found = {}
    for backbone in backbones:
        shares = [
            (kind, share_of(_trials(kind.backbones.get(backbone), kind, nodes, cpus)))
            for kind in _suitable(backbone, kinds)
        ]
        found[backbone] = tuple(Place(share, kind.kind, share) for kind, share in shares)
    return found


def fit_problems(backbones: Iterable[str], kinds: Sequence[GpuKind]) -> list[Problem]:
    """The backbones that fit on no GPU of the cluster, each a problem."""
    ordered = sorted(kinds, key=lambda kind: (kind.memory, kind.kind))
    gpus = listing(f"{kind.name} ({kind.memory / _GB:.1f} GB)" for kind in ordered)
    return [
        Problem(
            "search.backbones",
            f"{backbone} fits on no GPU of the cluster: {gpus}. Not even one image of "
            f"{_side(backbone, kinds)} px at a time does; choose a smaller image_size or backbone, "
            "training.gradient_checkpointing: true or training.precision: bf16",
        )
        for backbone in backbones
        if not _suitable(backbone, kinds)
    ]


def share_lines(
    backbones: Iterable[str], kinds: Sequence[GpuKind], nodes: Sequence[Node], cpus: int
) -> Iterator[str]:
    """The table for people: a line a backbone, with what it takes of each kind of GPU."""
    for backbone in backbones:
        cells = []
        for kind in _suitable(backbone, kinds):
            known = kind.backbones.get(backbone)
            count = _trials(known, kind, nodes, cpus)
            share = "a whole GPU each" if count == 1 else f"{count} trials share one"
            cells.append(f"{_taken(known, kind)}, {share}")
        yield f"{backbone}: {'; '.join(cells)}"


def _taken(known: TrialMemory | None, kind: GpuKind) -> str:
    """What a trial takes of a GPU of this kind, in words."""
    if known is None or known.bytes is None:
        return f"not measured on {kind.name}"
    batch = f"{known.params['batch_size']} images of {known.params['image_size']} px"
    parts = "" if known.whole else " in parts"
    gigabytes = f"{known.bytes / _GB:.1f} of the {kind.memory / _GB:.1f} GB of {kind.name}"
    return f"{gigabytes} with {batch}{parts}"


def _suitable(backbone: str, kinds: Sequence[GpuKind]) -> list[GpuKind]:
    """The kinds of GPUs for a backbone, the smallest first; none where it fits nowhere."""
    ordered = sorted(kinds, key=lambda kind: (kind.memory, kind.kind))
    whole = [kind for kind in ordered if _is_whole(kind.backbones.get(backbone), kind)]
    if whole:
        return whole
    return [k for k in ordered if (m := k.backbones.get(backbone)) is None or m.bytes is not None]


def _is_whole(known: TrialMemory | None, kind: GpuKind) -> bool:
    """True where its batches were seen to fit in one piece."""
    return (
        known is not None
        and known.bytes is not None
        and known.whole
        and (known.bytes <= kind.memory)
    )


def _trials(known: TrialMemory | None, kind: GpuKind, nodes: Sequence[Node], cpus: int) -> int:
    """Trials that share a GPU of this kind."""
    if known is None or known.bytes is None or not known.whole:
        return 1
    own = [node for node in nodes if node.kind == kind.kind and node.gpus >= 1]
    cores = min((node.cpus // cpus / int(node.gpus) for node in own), default=1.0)
    return trials_on_a_gpu(known.bytes, kind.memory, cores)


def _side(backbone: str, kinds: Sequence[GpuKind]) -> int:
    return next(int(kind.backbones[backbone].params["image_size"]) for kind in kinds)
