"""Records of models and of their versions."""

from dataclasses import dataclass
from pathlib import Path

from service.domain import Manifest, ModelFiles


@dataclass(frozen=True)
class ModelRecord:
    """A named line of versions."""

    name: str
    """Its key."""
    create_time_s: float
    update_time_s: float
    aliases: dict[str, int]
    version_count: int
    falling_back: tuple[str, ...] = ()
    """The aliases that fall back, by name."""


@dataclass(frozen=True)
class VersionRecord:
    """A published version and where its files lie."""

    files: ModelFiles
    create_time_s: float
    job_id: str
    manifest: Manifest
    answers_path: Path
    artifact_digest: str
    aliases: tuple[str, ...]
    is_candidate: bool

    @property
    def model(self) -> str:
        """Its model's key."""
        return self.files.name

    @property
    def version(self) -> int:
        """Its number."""
        return self.files.version


@dataclass(frozen=True)
class Publication:
    """A version that was made; with gate failures it is a candidate."""

    version: int
    manifest: Manifest


@dataclass(frozen=True)
class RolledBack:
    """An alias that points to an earlier version again."""

    model: ModelRecord
    from_version: int
    to_version: int


@dataclass(frozen=True)
class Removed:
    """What was deleted, and the digests that no version refers to any more."""

    model: str
    """Its key."""
    versions: list[int]
    is_model_gone: bool
    """Whether these were all of its versions."""
    backbones: list[str]
    heads: list[str]
    paths: list[Path]
    """Of the files that no version refers to any more."""
