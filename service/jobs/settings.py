"""How jobs are run: what the operator decided, for the supervisor and its attempts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.contract import PretrainedBackbone
from service.domain import DEFAULT_TENANT, PrecisionSetting, ProviderSetting

Slot = Literal["cpu", "gpu", "ranking"]
"""What a job takes while it runs, one of so many of its sort."""

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSES = 12
"""An attempt costs more than a write, and leaves events."""

AllowedDirs = Callable[[str], tuple[Path, ...]]
"""From a tenant to the folders that its jobs may read."""


def cache_owner(tenant: str) -> str:
    """Whose features a tenant's jobs find kept: "" for the default tenant's."""
    return "" if tenant == DEFAULT_TENANT else tenant


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How jobs are run."""

    work_dir: Path
    """A folder for each job under way, or back in the queue with a checkpoint."""
    weights_dir: Path
    allowed_dirs_of: AllowedDirs
    max_stored_bytes_of: Callable[[str], int | None] = lambda _tenant: None
    """What a tenant may store; archives that jobs unpack count."""
    registered_of: Callable[[str], list[PretrainedBackbone]] = lambda _tenant: []
    """From a tenant to the backbones that it registered, by name."""
    default_backbone: str
    prepared: Path | None = None
    """Where the environment keeps exported forms (`service.prepared`); None for nowhere."""
    cpu_jobs: int
    gpu_jobs: int
    ranking_jobs: int = 1
    gpus: tuple[str, ...] = ()
    """GPUs that trainers may have, as CUDA_VISIBLE_DEVICES names them; jobs share one only where
    more run at once than there are."""
    max_job_s: float
    feature_cache: Path | None = None
    """Where features are kept between jobs; None keeps none."""
    feature_cache_bytes: int = 2**30
    trainer_threads: int = 0
    provider: ProviderSetting = "auto"
    precision: PrecisionSetting = "auto"
    provider_table: Path | None = None
    start_timeout_s: float = 180.0
    """To the first record: a cold disk is slow to give what a trainer imports."""
    heartbeat_timeout_s: float = 60.0
    """Between records; one that computes sends some more often, see `JobSpec.heartbeat_s`."""
    max_crashes: int = 3
    """Attempts that end without a result before a job fails; lost machines are not its fault."""
    beat_s: float = 3.0
    """Between two renewals of the replica's lease, and two looks for what no notice told of."""
    stop_grace_s: float = 10.0
    warm_timeout_s: float = 60.0
    retry_s: float = 5.0
    """Longest time until what found the disk full, or the database held, is tried again."""
    room_timeout_s: float = 600.0
    """How long a job waits for a full disk or a held database before it fails: to begin, or, when
    it is trained, to publish."""
    min_free_bytes: int = 64 * 2**20
    """No job begins while the disk of `work_dir` has less."""

    def slot_of(self, device: str) -> Slot:
        """Returns the slot that a fine-tuning of this device ("auto", "cpu" or "cuda") takes."""
        if device == "auto":
            return "gpu" if self.slots["gpu"] else "cpu"
        return "gpu" if device == "cuda" else "cpu"

    @property
    def slots(self) -> dict[Slot, int]:
        """Counts the jobs that may run at once, by slot."""
        gpu_jobs = self.gpu_jobs if self.gpus else 0
        return {"cpu": self.cpu_jobs, "gpu": gpu_jobs, "ranking": self.ranking_jobs}

    def device_problem(self, device: str) -> str:
        """Says why no job can run on a device; "" where one can."""
        slots = self.slots
        if slots[self.slot_of(device)]:
            return ""
        names = {"cpu": slots["cpu"], "cuda": slots["gpu"]}
        runs_on = [name for name, count in names.items() if count]
        if not runs_on:
            return "this server trains nothing: ask its operator for --cpu-jobs or --gpu-jobs"
        return (
            f"this server trains nothing on the device {device!r}: leave the device open, or use "
            f"{' or '.join(runs_on)}"
        )

    def pause_s(self, tries: int) -> float:
        """How long to wait after so many tries: short at first, up to `retry_s`."""
        return min(self.retry_s, _FIRST_PAUSE_S * 2.0 ** min(tries, 10))

    def deferred_s(self, waited_s: float) -> float:
        """Returns how long to defer a job that has waited so long: as long again, within bounds."""
        return min(_LONGEST_PAUSES * self.retry_s, max(_FIRST_PAUSE_S, waited_s))
