"""Results of trainers on their way in, and reports on their way out.

A result's files become blobs before its version is published. A version's number and whether it
is a candidate are known only after its reports were written, and the latter may change: both are
filled in whenever a report is read, and the blob stays what was published.
"""

import html
from pathlib import Path

import msgspec

from service.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REFERENCE_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    REPORT_STANDING_MARK,
    REPORT_VERSION_MARK,
    ExportedBackbone,
    decode_manifest,
)
from service.domain import Manifest
from service.errors import Aborted, Reason, unloadable
from service.storage import backbone_rows
from service.storage.blobs import Blob, Blobs
from service.storage.version_rows import StoredVersion, VersionRecord

_MAX_MANIFEST_BYTES = 16 * 2**20
"""One of 100 000 classes fits."""
_OWN = (MANIFEST_FILE, HEAD_FILE, ANSWERS_FILE, REPORT_JSON_FILE, REPORT_HTML_FILE)


def put(blobs: Blobs, out_dir: Path) -> StoredVersion:
    """Stores a trainer's result; doing it again changes nothing. Touches files and the database.

    Raises Aborted (TRAINING_FAILED) when the result is not whole, and as `Blobs.put_all`.
    """
    manifest = _manifest(out_dir)
    for name in _OWN:
        if not (out_dir / name).is_file():
            raise _not_whole(f"{name} is missing")
    backbone = _shared(blobs, out_dir / BACKBONE_FILE, manifest.backbone_digest)
    reference = None
    if backbone_rows.has_reference(manifest):
        reference = _shared(blobs, out_dir / REFERENCE_FILE, manifest.reference_digest)
    stored = blobs.put_all([(out_dir / name, "") for name in _OWN])
    return StoredVersion(
        manifest=manifest,
        manifest_blob=stored[0],
        head=stored[1],
        answers=stored[2],
        report_json=stored[3],
        report_html=stored[4],
        backbone=backbone,
        reference=reference,
    )


def put_exported(blobs: Blobs, out_dir: Path, exported: ExportedBackbone) -> list[Blob]:
    """Stores an exported backbone, with its reference if it has one; errors as `put`."""
    stored = [_shared(blobs, out_dir / f"{exported.digest}.onnx", exported.digest)]
    if exported.reference:
        stored.append(_shared(blobs, out_dir / REFERENCE_FILE, exported.reference))
    return stored


def _shared(blobs: Blobs, source: Path, digest: str) -> Blob:
    """Stores a file that versions share, or finds it where the trainer brought none."""
    if source.exists():
        stored = blobs.put(source)
        if stored.digest != digest:
            raise _not_whole(
                f"{source.name} has digest {stored.digest}, the manifest says {digest}"
            )
        return stored
    known = blobs.find(digest)
    if known is None:
        raise _not_whole(f"it brings no {source.name}, and {digest} is not stored")
    return known


def _manifest(out_dir: Path) -> Manifest:
    try:
        if (size := (out_dir / MANIFEST_FILE).stat().st_size) > _MAX_MANIFEST_BYTES:
            raise _not_whole(f"{MANIFEST_FILE} has {size} bytes")
        return decode_manifest((out_dir / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise _not_whole(f"{MANIFEST_FILE} is missing") from None
    except msgspec.DecodeError as error:
        raise _not_whole(f"{MANIFEST_FILE} cannot be read: {error}") from error


def _not_whole(what: str) -> Aborted:
    return Aborted(Reason.TRAINING_FAILED, f"the trainer's result is not whole: {what}")


def filled_json(content: bytes, record: VersionRecord) -> bytes:
    """Sets `version`, `is_candidate` and `gate_failures` of a report.json.

    Raises Damaged (MODEL_UNLOADABLE) where it is not a JSON object.
    """
    try:
        report = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unloadable("report", "is not a JSON object") from error
    filled = {
        "version": record.version,
        "is_candidate": record.is_candidate,
        "gate_failures": record.gate_failures,
    }
    return msgspec.json.format(msgspec.json.encode({**report, **filled}))


def filled_html(content: bytes, record: VersionRecord) -> bytes:
    """Writes the number and how the version stands into the title and the header of a page.

    Raises Damaged (MODEL_UNLOADABLE) where it is not UTF-8.
    """
    kind = " (candidate)" if record.is_candidate else ""
    try:
        page = content.decode()
    except UnicodeDecodeError as error:
        raise unloadable("report", "is not UTF-8") from error
    # The first is the head's: every name in the page is escaped.
    page = page.replace("</title>", f", version {record.version}{kind}</title>", 1)
    page = page.replace(REPORT_VERSION_MARK, f" version {record.version}{kind}", 1)
    return page.replace(REPORT_STANDING_MARK, _standing(record), 1).encode()


def _standing(record: VersionRecord) -> str:
    failures = record.gate_failures
    if not failures and not record.is_candidate:
        return ""
    why = html.escape("; ".join(failures))
    status = (
        "This version is a candidate: it did not pass its gate, and no alias moved to it."
        if record.is_candidate
        else "This version did not pass its gate and was published by hand."
    )
    return f'<p class="warning-text">{status} {why}{"." if why else ""}</p>'
