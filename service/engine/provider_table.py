"""Keeps which provider is quickest for each backbone on this machine, and decides it from timings.

The table lies beside the data, and is of one machine: where the processor, its share or
the libraries differ from those that it was measured with, it begins anew.
"""

import logging
import math
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
"""A provider is taken in place of the first when a run takes at most this part of the time: less
is noise."""
AGREE = 1e-4
"""Largest difference of a probability by which two providers still agree: a tenth of what a
version's answers may differ by, since its head and images are not those that were compared."""
_MOST = 1000
"""Backbones in the table; those measured first leave."""
_LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-ep-openvino", "openvino")


class Timing(msgspec.Struct, frozen=True):
    """The quickest of several runs of a batch, taken in turn with those of other providers."""

    provider: ProviderName
    cores: int
    batch: int
    wall_s: float
    cpu_s: float
    """Of the same run, all its threads together; its share of those side by side."""
    is_disturbed: bool = False
    """Whether even that run was interrupted by other programs."""


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

    The first one stays where none is quicker by 1 %, as the geometric mean over batches
    of the part of its time, or where the quicker does not agree with it. A run on one core
    is one of many side by side, so what counts is its processor time, whoever else
    computes; a run on several is alone, and counts by the clock, unless other programs
    disturbed one of the two.
    """
    chosen: dict[int, ProviderName] = {}
    for cores in sorted({timing.cores for timing in timings}):
        found = {(t.provider, t.batch): t for t in timings if t.cores == cores}
        batches = sorted({batch for name, batch in found if name == first})
        best, least = first, WORTH
        for name in sorted({name for name, _ in found} - {first}):
            pairs = [(found[first, b], found[name, b]) for b in batches if (name, b) in found]
            if not pairs or not differences.get(name, math.inf) <= AGREE:
                continue
            ratio = math.exp(sum(math.log(_ratio(*pair)) for pair in pairs) / len(pairs))
            if ratio <= least:
                best, least = name, ratio
        chosen[cores] = best
    return chosen


def _ratio(before: Timing, after: Timing) -> float:
    if before.cores == 1 or before.is_disturbed or after.is_disturbed:
        return after.cpu_s / before.cpu_s
    return after.wall_s / before.wall_s


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
