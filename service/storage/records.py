"""Records of models and of their versions."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.contract import Gate
from service.domain import (
    GateCheck,
    ImageDecoding,
    Manifest,
    ModelFiles,
    ModelKey,
    VersionSource,
    gate_failures,
)
from service.storage.blobs import Blob


@dataclass(frozen=True)
class ModelRecord:
    """A named line of versions."""

    key: ModelKey
    create_time_s: float
    update_time_s: float
    aliases: dict[str, int]
    version_count: int


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """A published version as its row has it; `ModelStore.manifest` tells the rest."""

    model: ModelKey
    version: int
    create_time_s: float
    job_id: str
    manifest_digest: str
    head_digest: str
    backbone_digest: str
    answers_digest: str
    report_json_digest: str
    report_html_digest: str
    backbone: str
    """As requests name it."""
    decoding: ImageDecoding
    gate_checks: tuple[GateCheck, ...]
    aliases: tuple[str, ...]
    is_candidate: bool
    erased_images: int = 0
    """Images that it was trained or measured on and that were erased since."""

    @property
    def files(self) -> ModelFiles:
        """Returns what the engine needs of it."""
        return ModelFiles(
            self.model, self.version, self.backbone_digest, self.head_digest, self.decoding
        )

    @property
    def gate_failures(self) -> list[str]:
        """Lists what of its gate it did not reach, for people."""
        return gate_failures(self.gate_checks)


@dataclass(frozen=True, kw_only=True)
class StoredVersion:
    """A trainer's result whose files are stored, and that is not published yet."""

    manifest: Manifest
    manifest_blob: Blob
    head: Blob
    backbone: Blob
    answers: Blob
    report_json: Blob
    report_html: Blob

    @property
    def own(self) -> list[Blob]:
        """Lists all of its files but for the backbone, which versions may share."""
        return [self.manifest_blob, self.head, self.answers, self.report_json, self.report_html]

    def files(self, model: ModelKey) -> ModelFiles:
        """Returns what the engine needs of it, as a version of `model`."""
        return ModelFiles(model, 0, self.backbone.digest, self.head.digest, self.manifest.decoding)


@dataclass(frozen=True, kw_only=True)
class NewVersion:
    """A version that is to be published."""

    model: ModelKey
    job_id: str
    stored: StoredVersion
    sources: Sequence[VersionSource] = ()
    """What it was trained on, its base's first."""
    read_s: float = float("inf")
    """When its job read these, seconds since 1970: images may have been erased since."""
    gate: Gate | None = None
    max_stored_bytes: int | None = None
    """What its tenant may store; None for no limit."""


@dataclass(frozen=True)
class Publication:
    """A version that was made; with gate failures it is a candidate."""

    version: int
    manifest: Manifest
    """With its gate's checks as published."""


@dataclass(frozen=True)
class RolledBack:
    """An alias that points to an earlier version again."""

    model: ModelRecord
    from_version: int
    to_version: int
