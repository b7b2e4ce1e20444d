"""Whether what a gate's comparison found still holds when its version is published.

The trainer compares with the version that an alias pointed to when the attempt
began. Works in its caller's transaction; writes nothing.
"""

import msgspec

from service.domain import Manifest
from service.storage import aliases
from service.storage.database import Connection


def checked(connection: Connection, model: str, alias: str, manifest: Manifest) -> Manifest:
    """The manifest; its `not_worse` fails where the model's `alias` has moved since.

    An alias that is gone leaves nothing to be worse than.
    """
    now = aliases.all_of(connection, model).get(alias)
    if now is None or now == manifest.incumbent_version:
        return manifest
    before = manifest.incumbent_version
    detail = (
        f"the alias {alias} moved to version {now} while this version was made: it was compared "
        f"with {'none' if before is None else f'version {before}'}; promote it, or fine-tune again"
    )
    checks = [
        msgspec.structs.replace(check, verdict="failed", passed=False, detail=detail)
        if check.name == "not_worse" and check.passed
        else check
        for check in manifest.gate_checks
    ]
    return msgspec.structs.replace(manifest, gate_checks=checks)
