"""The manifests of published versions, in memory where they were read before."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from service.contract import decode_manifest
from service.domain import GateCheck, Manifest
from service.errors import unloadable
from service.storage.blobs import Blobs
from service.storage.version_rows import VersionRecord

_MAX_BYTES = 32 * 2**20
"""Limit on what is in memory, as JSON."""


class Manifests:
    """Reads manifests, which never change; may be used from any thread."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._known: OrderedDict[str, tuple[Manifest, int]] = OrderedDict()
        """By digest, with the bytes of its JSON; the least recently used first."""
        self._bytes = 0
        self._guard = threading.Lock()

    def of(self, record: VersionRecord) -> Manifest:
        """Returns a version's manifest, with its gate's checks as published.

        Reads its blob where it is not in memory; raises as `Blobs.read`.
        """
        digest = record.manifest_digest
        with self._guard:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
        manifest = known[0] if known else self._read(record)
        return with_checks(manifest, record.gate_checks)

    def _read(self, record: VersionRecord) -> Manifest:
        kind = f"manifest of version {record.version} of {record.model.name}"
        content = self._blobs.read(record.manifest_digest, kind)
        try:
            manifest = decode_manifest(content)
        except msgspec.DecodeError as error:
            raise unloadable(kind, "cannot be read") from error
        with self._guard:
            if record.manifest_digest not in self._known:
                self._known[record.manifest_digest] = manifest, len(content)
                self._bytes += len(content)
            while self._bytes > _MAX_BYTES:
                _, (_, nbytes) = self._known.popitem(last=False)
                self._bytes -= nbytes
        return manifest


def with_checks(manifest: Manifest, checks: Sequence[GateCheck]) -> Manifest:
    """Returns the manifest with these checks of its gate."""
    return msgspec.structs.replace(manifest, gate_checks=list(checks))
