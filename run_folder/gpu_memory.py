"""Records of what fold trials take of a GPU's memory, by kind of GPU and backbone."""

from __future__ import annotations

from pydantic import Field

from foldrace.run_folder.records import Count, Params, StoredRecord


class TrialMemory(StoredRecord):
    """Memory of one backbone's fold trials on one kind of GPU."""

    params: Params
    """The hyperparameters that it was measured with: those that take the most."""
    bytes: Count | None
    """All that a trial's process had of the GPU at its peak; None where not even one image at a
    time fits."""
    whole: bool = True
    """False where the batch had to be taken in parts."""


class GpuKind(StoredRecord):
    """What is known of one kind of GPU."""

    kind: str
    """Name of Ray's resource that only its nodes have."""
    memory: Count
    """Bytes of the smallest of these GPUs."""
    backbones: dict[str, TrialMemory] = Field(default={})
    """Those that were measured."""

    @property
    def name(self) -> str:
        """The kind, for people."""
        return self.kind.removeprefix("accelerator_type:")


class GpuMemory(StoredRecord):
    """What a run knows of GPUs."""

    kinds: tuple[GpuKind, ...] = ()


class GpuReading(StoredRecord):
    """What the measurement on one GPU gives."""

    memory: Count
    """Bytes of the GPU."""
    trial: TrialMemory | None = None
    """None where no backbone was to be measured."""
