"""How jobs are run: what the operator decided, for the supervisor and its attempts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.domain import Precision, ProviderSetting

Kind = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How jobs are run."""

    work_dir: Path
    """A folder for each job under way or back in the queue."""
    weights_dir: Path
    allowed_dirs: tuple[Path, ...]
    default_backbone: str
    cpu_jobs: int
    gpu_jobs: int
    has_gpu: bool
    max_job_s: float
    feature_cache: Path | None = None
    """Where features are kept between jobs; None keeps none."""
    feature_cache_bytes: int = 2**30
    trainer_threads: int = 0
    provider: ProviderSetting = "auto"
    precision: Precision = "fast"
    start_timeout_s: float = 180.0
    """To the first record: a cold disk is slow to give what a trainer imports."""
    heartbeat_timeout_s: float = 60.0
    """Between records; trainers send one at least every 10 s."""
    max_crashes: int = 2
    stop_grace_s: float = 10.0
    warm_timeout_s: float = 60.0
    retry_s: float = 5.0
    """Until an outcome that found the disk full is saved again."""
