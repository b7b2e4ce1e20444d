"""Every setting: its name, its type, its default, its bounds and what it means.

`settings` reads them.
"""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from service.backbones import DEFAULT_BACKBONE, TIMM
from service.contract import PrecisionSetting, ProviderSetting


class BadConfig(ValueError):  # noqa: N818
    """Raised for a wrong key or value; the message names it and says what is valid."""


def _setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    separator: str = "",
) -> Any:
    """Returns a field; of one with a separator the value is a list, of which texts have it."""
    about = {"text": text, "low": low, "high": high, "separator": separator}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Holds all settings; their texts are also the help's and the reference's."""

    host: str = _setting("127.0.0.1", "Address that the gRPC port listens on")
    port: int = _setting(50051, "gRPC port; 0 picks a free one", low=0, high=65535)
    metrics_host: str = _setting("127.0.0.1", "Address that the metrics port listens on")
    metrics_port: int = _setting(
        9464, "Prometheus metrics over HTTP at /metrics; 0 picks a free port", low=0, high=65535
    )
    tls_cert_file: Path | None = _setting(
        None, "Certificate chain of the gRPC port, PEM; reloaded when it changes"
    )
    tls_key_file: Path | None = _setting(None, "Private key of that certificate, PEM")
    tls_client_ca_file: Path | None = _setting(
        None, "Authorities that sign clients' certificates, PEM; clients must then show one"
    )
    access_file: Path | None = _setting(
        None,
        "Tenants, tokens, roles and quotas, TOML (docs/how-to/access.md); reloaded when it changes",
    )
    allow_unauthenticated: Literal["no", "yes"] = _setting(
        "no",
        "yes: everybody who reaches the address may do everything; needed to listen beyond this "
        "machine without access_file or tls_client_ca_file",
    )
    data_dir: Path = _setting(Path("data"), "Folder for jobs, datasets and models")
    blobs_dir: Path | None = _setting(
        None,
        "Folder for the files of models, backbones and datasets, which may be on a network; "
        "DATA_DIR/blobs if not set",
    )
    blob_cache_mb: int = _setting(
        0,
        "Copies of those files in DATA_DIR/cache, MiB, for a blobs_dir on a slow disk; 0 reads "
        "them in place",
        low=0,
    )
    allowed_dirs: tuple[Path, ...] = _setting(
        (),
        "Folders on the server's disk that jobs may read images from, separated by ':'; empty "
        "means none",
        separator=":",
    )
    weights_dir: Path | None = _setting(
        None,
        "Folder for downloaded pretrained weights, which may be a pre-filled mirror; "
        "DATA_DIR/weights if not set",
    )
    default_backbone: str = _setting(
        DEFAULT_BACKBONE, f"Backbone of a job that names none; {TIMM}NAME for timm's"
    )
    log_format: Literal["json", "console"] = _setting("json", "Format of the log lines")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Lowest log level that is written"
    )

    provider: ProviderSetting = _setting(
        "auto",
        "Execution provider; auto uses CUDA where it works, else for each backbone the faster "
        "of ONNX Runtime's CPU provider and OpenVINO (if installed), as measured on this "
        "machine",
    )
    precision: PrecisionSetting = _setting(
        "auto",
        "Number format of new versions, on every machine that serves them; auto is fp16 on "
        "GPUs, on CPUs int8 with VNNI for heads on backbones that keep their accuracy in it, "
        "bf16 with AMX where it is measured to be faster, else fp32; int8 quantises every "
        "version that it is not shown to harm; a request may name another",
    )
    threads: int = _setting(
        0,
        "Threads that decode and infer; 0 means one for each core that the process may use",
        low=0,
        high=1024,
    )
    max_batch: int = _setting(
        0,
        "Largest batch of a backbone; 0 means 32, and 128 on a GPU; the best size up to it is "
        "measured when the backbone is loaded",
        low=0,
        high=4096,
    )
    max_queue: int = _setting(
        1024,
        "Maximum number of images waiting for inference; more are refused",
        low=1,
        high=1_000_000,
    )
    max_images: int = _setting(
        256,
        "Maximum number of images in a call that classifies, times the models that it names",
        low=1,
        high=4096,
    )
    gpu_mem_limit_mb: int = _setting(
        0,
        "GPU memory limit of each loaded backbone, MiB, which leaves room for a trainer; 0 "
        "means no limit",
        low=0,
        high=1_000_000,
    )
    model_memory_mb: int = _setting(
        2048,
        "Memory for loaded backbones and heads, MiB; the least recently used are unloaded",
        low=1,
    )
    recent_features_mb: int = _setting(
        64,
        "Features of recent images kept in memory, MiB (64 are about 11,000 images of 1,280 "
        "features): an image that comes again, to any model on the same backbone, is not "
        "computed again; 0 keeps none",
        low=0,
    )
    predict_timeout_s: float = _setting(
        30.0,
        "Maximum duration of a call that classifies; a shorter deadline of the call takes "
        "precedence",
        low=0.001,
    )
    load_timeout_s: float = _setting(
        30.0, "Maximum time to wait for a model to be loaded", low=0.001
    )
    max_message_mb: int = _setting(64, "Largest gRPC message accepted, MiB", low=1, high=2047)
    accept_gzip: Literal["no", "yes"] = _setting(
        "no",
        "yes accepts messages compressed with gzip; some kilobytes of it then need "
        "max_message_mb of memory before the caller is authenticated",
    )
    max_calls: int = _setting(
        1000,
        "Maximum number of concurrent calls of one method; more are refused",
        low=1,
        high=1_000_000,
    )
    max_uploads: int = _setting(
        16,
        "Maximum number of concurrent uploads, and of concurrent calls that start a fine-tuning",
        low=1,
        high=10_000,
    )
    max_watchers: int = _setting(
        1000, "Maximum number of concurrent watchers of jobs", low=1, high=1_000_000
    )
    message_timeout_s: float = _setting(
        60.0, "Maximum time for one message to arrive, or to be read by its receiver", low=0.001
    )

    max_upload_mb: int = _setting(2048, "Largest dataset upload, MiB", low=1)
    max_unpacked_mb: int = _setting(8192, "Maximum unpacked size of an archive, MiB", low=1)
    max_dataset_files: int = _setting(200_000, "Maximum number of files in a dataset", low=1)
    max_backbone_mb: int = _setting(
        512, "Largest ONNX file that can be registered as a backbone, MiB", low=1, high=1024
    )

    cpu_jobs: int = _setting(
        1, "Number of jobs that train on the CPU at the same time", low=0, high=64
    )
    gpu_jobs: int = _setting(
        1, "Number of jobs that train on a GPU at the same time", low=0, high=64
    )
    ranking_jobs: int = _setting(
        1, "Number of rankings of backbones at the same time", low=0, high=64
    )
    trainer_threads: int = _setting(
        0,
        "Threads of a trainer; 0 means one for each core that the process may use",
        low=0,
        high=1024,
    )
    trainer_niceness: int = _setting(
        10,
        "Niceness of trainers, 0 to 19: how far they give way to other processes; beside other "
        "programs that keep all cores busy, a job at 10 gets a tenth of a core",
        low=0,
        high=19,
    )
    pass_environment: str = _setting(
        "",
        "Environment variables that trainers and readers get besides those that they always "
        "get, separated by commas; NAME* means all that begin with NAME",
        separator=",",
    )
    warm_trainers: int = _setting(
        1,
        "Trainers that wait with their libraries imported, about 130 MiB each (80 to 90 of it its "
        "own), so that jobs start at once; with 0 the first job exports the default backbone",
        low=0,
        high=64,
    )
    feature_cache_mb: int = _setting(
        1024,
        "Features kept on disk between jobs, MiB, so that images seen before are not computed "
        "again; 0 keeps none",
        low=0,
    )
    max_queued_jobs: int = _setting(1000, "Maximum number of waiting jobs; more are refused", low=1)
    job_retention_days: float = _setting(
        365.0, "Days after which ended jobs are deleted; their versions are kept", low=0.01
    )
    event_retention_days: float = _setting(
        90.0, "Days after which events of ended jobs are deleted, except the last", low=0.01
    )
    dataset_retention_days: float = _setting(
        0.0,
        "Days after which datasets are deleted that no job needs and no version was trained on; "
        "0 keeps them",
        low=0,
    )
    collect_grace_s: float = _setting(
        3600.0,
        "Seconds for which unused files are kept, and again before they are deleted; longer "
        "than a backup takes",
        low=0.01,
    )
    max_job_s: float = _setting(14_400.0, "Maximum duration of a job", low=1)
    heartbeat_timeout_s: float = _setting(
        60.0,
        "Seconds without a sign of life after which a trainer is killed and its job tried again",
        low=1,
    )
    database_timeout_s: float = _setting(
        10.0, "Maximum time to wait while another process locks the database", low=0.01
    )
    min_free_mb: int = _setting(64, "Free disk space below which no job starts, MiB", low=0)
    drain_s: float = _setting(20.0, "Time for calls and trainers to end after SIGTERM", low=0)
    failpoints: str = _setting("", "Failures to inject at named points; for tests only")

    @property
    def address(self) -> str:
        """The address of the gRPC port, HOST:PORT."""
        is_bare_v6 = ":" in self.host and not self.host.startswith("[")
        return f"[{self.host}]:{self.port}" if is_bare_v6 else f"{self.host}:{self.port}"

    @property
    def blobs_folder(self) -> Path:
        """The folder of blobs."""
        return self.blobs_dir or self.data_dir / "blobs"

    @property
    def weights_folder(self) -> Path:
        """The folder of pretrained weights."""
        return self.weights_dir or self.data_dir / "weights"

    @property
    def provider_table(self) -> Path:
        """The file of what was measured of backbones on this machine."""
        return self.data_dir / "providers.json"

    @property
    def feature_cache(self) -> Path | None:
        """The file of features that are kept between jobs; None if none are kept."""
        return self.data_dir / "features.sqlite" if self.feature_cache_mb else None


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches an address; resolves no name but localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def variable(name: str) -> str:
    """Returns the environment variable of a setting."""
    return "GRAFT_" + name.upper()


def flag(name: str) -> str:
    """Returns the flag of a setting."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """Returns a default as help and table have it."""
    if value is None or value == ():
        return "not set"
    return f"{value:g}" if isinstance(value, float) else str(value)
