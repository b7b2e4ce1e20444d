"""Keeps which provider is quickest for each backbone on this machine, and decides it from timings.

The table lies beside the data, and is of one machine: where the processor, its share or
the libraries differ from those that it was measured with, it begins anew.
"""

import logging
import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from service.domain import Precision
from service.engine.providers import ProviderName
from service.ops import cpus

log = logging.getLogger(__name__)

WORTH = 0.99
"""A provider is taken in place of the first when a run is shown to take at most this part of the
time: less is no gain beside the memory of a second library."""
AGREE = 1e-4
"""Largest difference of a probability by which two providers still agree: a tenth of what a
version's answers may differ by, since its head and images are not those that were compared."""
_MOST = 1000
"""Backbones in the table; those measured first leave."""
_LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "openvino")


class Timing(msgspec.Struct, frozen=True):
    """Rounds of runs of a batch, each in turn with those of other providers."""

    provider: ProviderName
    cores: int
    batch: int
    wall_s: float
    """Of the quickest round."""
    cpu_s: float
    """The least of a round, all its threads together; its share of those side by side."""
    ratio: float = 1.0
    """To the first provider's time; see `paired`."""


class Measured(msgspec.Struct, frozen=True):
    """What is known of a backbone's file on this machine."""

    precision: Precision
    timings: list[Timing]
    differences: dict[ProviderName, float]
    """Largest difference of a probability from the first provider's, by provider."""
    providers: dict[int, ProviderName]
    """The quickest, by the number of cores of a run."""
    max_batch: int
    """Largest batch that still pays."""
    infer_s: float
    """Seconds that one core computes for an image, about."""


class _Table(msgspec.Struct):
    machine: dict[str, str]
    backbones: dict[str, Measured] = {}


def choose(
    timings: Sequence[Timing], first: ProviderName, differences: Mapping[ProviderName, float]
) -> dict[int, ProviderName]:
    """Chooses a provider for each number of cores.

    The first one stays where none is shown to be quicker by 1 %, as the geometric mean of its
    ratios over batches, or where the quicker does not agree with it.
    """
    chosen: dict[int, ProviderName] = {}
    for cores in sorted({timing.cores for timing in timings}):
        ratios: dict[ProviderName, list[float]] = {}
        for timing in timings:
            if timing.cores == cores and differences.get(timing.provider, math.inf) <= AGREE:
                ratios.setdefault(timing.provider, []).append(timing.ratio)
        means = {name: statistics.geometric_mean(own) for name, own in ratios.items()}
        quickest = min(means, key=means.__getitem__, default=first)
        chosen[cores] = quickest if means.get(quickest, 1.0) <= WORTH else first
    return chosen


def paired(first_s: Sequence[float], own_s: Sequence[float]) -> float:
    """Compares the seconds of rounds with those of the first provider's run in the same round.

    Returns the upper end, one-sided 95 %, of the median of their ratios: what slows a machine for
    seconds slows both, what interrupts a run now and then does not count, and what the rounds do
    not show is not believed. Of n ratios in order the ((n + 1.645 sqrt(n)) / 2)th, the usual bound
    by the sign test.
    """
    ratios = sorted(own / first for first, own in zip(first_s, own_s, strict=True))
    place = math.ceil((len(ratios) + 1.645 * math.sqrt(len(ratios))) / 2)
    return ratios[min(place, len(ratios)) - 1]


def machine_key() -> dict[str, str]:
    """Describes what timings hold for: the processor, how much of it, and the libraries."""
    about = cpus.describe()
    versions = {}
    for package in _LIBRARIES:
        for found in metadata.distributions(name=package):
            versions[package] = found.version
    return {
        "processor": about.model,
        "flags": " ".join(sorted(about.flags)),
        "cores": f"{about.available_cores} of {about.cpus}, {about.physical_cores} physical",
        "quota": "none" if about.quota is None else f"{about.quota:g}",
        **versions,
    }


def read(path: Path) -> _Table | None:
    """Reads a table's file; None where there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Table)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("the table of providers cannot be read, and begins anew: %s", error)
        return None


class ProviderTable:
    """What was measured on this machine, in a file. Thread-safe.

    Trainers read the file; the serving process alone writes it.
    """

    def __init__(self, path: Path | None, machine: dict[str, str]) -> None:
        self._path = path
        self._lock = threading.Lock()
        known = read(path) if path is not None else None
        if known is not None and known.machine != machine:
            log.info("the providers were measured on another machine, or with other libraries")
            known = None
        self._table = known or _Table(machine)

    def backbones(self) -> dict[str, Measured]:
        """Returns all that was measured, by the files' digests."""
        with self._lock:
            return dict(self._table.backbones)

    def get(self, digest: str) -> Measured | None:
        """Returns what is known of a file."""
        with self._lock:
            return self._table.backbones.get(digest)

    def put(self, digest: str, measured: Measured) -> None:
        """Keeps what was measured of a file; what cannot be written is kept in memory."""
        with self._lock:
            backbones = self._table.backbones
            backbones.pop(digest, None)
            backbones[digest] = measured
            while len(backbones) > _MOST:
                del backbones[next(iter(backbones))]
            written = msgspec.json.format(msgspec.json.encode(self._table))
            if self._path is None:
                return
            beside = self._path.with_suffix(".new")
            try:
                beside.write_bytes(written)
                beside.replace(self._path)
            except OSError as error:
                log.warning("the table of providers cannot be written: %s", error)
