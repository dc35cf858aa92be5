"""Where the next fold trial may run: a place for it, or the word that it waits.

Takes the nodes and what runs, gives a `Place` with what is to be reserved. Knows no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from foldrace.config.schema import ResourcesConfig
from foldrace.scheduling.nodes import Node

UNITS = 10_000
"""Parts of a GPU that can be reserved: Ray counts no finer."""
_A_BIT = 0.001  # of the one that a node has of its kind of GPU: enough for a thousand trials


@dataclass(frozen=True)
class Place:
    """What a fold trial reserves beside its cores."""

    gpus: float = 0.0
    """GPUs of each of its devices; fractions share one."""
    kind: str = ""
    """Name of Ray's resource that only nodes with such GPUs have; empty: any node."""
    devices: float = 1.0
    """Devices that its seconds are multiplied by."""
    gpu: tuple[str, int] | None = None
    """Node and number of the GPU that it is counted on, where GPUs are counted one by one."""

    @property
    def units(self) -> int:
        """Its part of a GPU."""
        return round(self.gpus * UNITS)

    def bundle(self, cpus: float) -> dict[str, float]:
        """Name of Ray's resource -> what one of its devices takes of it, with so many cores."""
        amounts = {"CPU": cpus, "GPU": self.gpus, self.kind: _A_BIT}
        return {name: float(amount) for name, amount in amounts.items() if name and amount}


class Vacancy:
    """The room that is left at one moment, for trials that are all alike."""

    def __init__(self, is_full: bool, place: Place) -> None:
        self.is_full = is_full
        """True where no trial fits, of whichever backbone."""
        self.waiting = False
        """True once a trial was refused."""
        self._place = place

    def take(self, backbone: str | None) -> Place | None:
        """A place for one more trial of the backbone; None: it waits for one.

        Whoever asks later gets no place that one who waits could have. None as a backbone: an
        update of the result, which runs models of all.
        """
        return self._place


class Room:
    """The room of a cluster, for trials that are all alike."""

    def __init__(self, slots: Callable[[], int], place: Place = Place()) -> None:
        self._slots, self._place = slots, place

    def slots(self, backbone: str | None = None) -> int:
        """Trials of the backbone that can run at a time; None: of all backbones on average."""
        return self._slots()

    @property
    def most(self) -> int:
        """Trials that can run at a time, of the backbone of which the most fit."""
        return self._slots()

    def place(self, backbone: str) -> Place:
        """What a trial of the backbone most often reserves."""
        return self._place

    def devices(self, backbone: str | None = None) -> float:
        """Devices of a trial of the backbone; None: of all on average."""
        return self._place.devices

    def vacancy(self, running: Sequence[Place]) -> Vacancy:
        """The room that these leave."""
        return Vacancy(len(running) >= self._slots(), self._place)


class SharedRoom(Room):
    """The room of GPUs of which each backbone has a share of its own.

    Trials are counted on GPUs as Ray puts them there on one node: each on the fullest GPU that has
    room. Where Ray chooses among nodes it may choose another, and a trial may have to wait for it.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        resources: ResourcesConfig,
        places: Mapping[str, Sequence[Place]],
    ) -> None:
        """`places`: backbone -> where its trials may run, one for each kind of GPU."""
        self._nodes, self._resources, self._places = nodes, resources, places
        largest: dict[str, Place] = {}
        for place in (place for own in places.values() for place in own):
            largest[place.kind] = max(largest.get(place.kind, place), place, key=lambda p: p.gpus)
        self._update = tuple(largest.values())

    def slots(self, backbone: str | None = None) -> int:
        """See `Room.slots`."""
        if backbone is not None:
            return self._count(backbone)
        counts = [self._count(backbone) for backbone in self._places]
        return max(1, round(fmean(counts))) if any(counts) else 0

    @property
    def most(self) -> int:
        """See `Room.most`."""
        return max(self._count(backbone) for backbone in self._places)

    def place(self, backbone: str) -> Place:
        """See `Room.place`."""
        return self._places[backbone][0]

    def devices(self, backbone: str | None = None) -> float:
        """See `Room.devices`."""
        if backbone is not None:
            return self._places[backbone][0].devices
        return fmean(places[0].devices for places in self._places.values())

    def vacancy(self, running: Sequence[Place]) -> Vacancy:
        """See `Room.vacancy`."""
        limit = self._resources.max_concurrent
        gpus = [] if limit is not None and len(running) >= limit else [*self._free(running)]
        return _SharedVacancy(gpus, self._places, self._update)

    def _count(self, backbone: str) -> int:
        count = 0
        for place in self._places[backbone]:
            for node in self._nodes():
                if node.kind == place.kind:
                    by_cores = int(node.cpus // self._resources.cpus_per_trial)
                    count += min(by_cores, int(node.gpus) * (UNITS // place.units))
        limit = self._resources.max_concurrent
        return count if limit is None else min(count, limit)

    def _free(self, running: Sequence[Place]) -> Iterator[_FreeGpu]:
        """The GPUs whose nodes have cores for one more trial."""
        taken, trials = Counter[tuple[str, int]](), Counter[str]()
        for place in running:
            if place.gpu is not None:
                taken[place.gpu] += place.units
                trials[place.gpu[0]] += 1
        cpus = self._resources.cpus_per_trial
        for node in self._nodes():
            if (trials[node.name] + 1) * cpus <= node.cpus:
                for number in range(int(node.gpus)):
                    gpu = node.name, number
                    yield _FreeGpu(gpu, node.kind, UNITS - taken[gpu])


@dataclass(frozen=True)
class _FreeGpu:
    """What is left of a GPU."""

    gpu: tuple[str, int]
    kind: str
    units: int


class _SharedVacancy(Vacancy):
    def __init__(
        self,
        gpus: Sequence[_FreeGpu],
        places: Mapping[str, Sequence[Place]],
        update: Sequence[Place],
    ) -> None:
        self._gpus, self._places, self._update = gpus, places, update
        self._kept: set[str] = set()  # kinds of GPUs that somebody waits for
        self.waiting = False
        every = {place for own in places.values() for place in own}
        self.is_full = not any(self._fullest(place) for place in every)

    def take(self, backbone: str | None) -> Place | None:
        wanted = self._update if backbone is None else self._places[backbone]
        for place in wanted:
            free = None if place.kind in self._kept else self._fullest(place)
            if free is not None:
                return replace(place, gpu=free.gpu)
        self.waiting = True
        self._kept |= {place.kind for place in wanted}
        return None

    def _fullest(self, place: Place) -> _FreeGpu | None:
        """The fullest GPU with room for it; the first one on a tie."""
        fitting = (g for g in self._gpus if g.kind == place.kind and g.units >= place.units)
        return min(fitting, key=lambda g: g.units, default=None)
