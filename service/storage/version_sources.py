"""What versions were trained on: datasets, and folders of the server's; and what of it was erased.

Owns the table version_sources, and the column erased_images of versions. Every function works in
its caller's transaction.
"""

from collections.abc import Collection, Mapping, Sequence

from service.domain import VersionSource
from service.storage.database import Connection


def note(
    connection: Connection, tenant: str, model: str, version: int, sources: Sequence[VersionSource]
) -> None:
    """Notes the sources of a version, the oldest first."""
    connection.executemany(
        "INSERT INTO version_sources (tenant, model, version, position, role, dataset_id, folder)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (tenant, model, version, position, each.role, each.dataset_id, each.folder)
            for position, each in enumerate(sources)
        ],
    )


def mark_erased(connection: Connection, tenant: str, dataset_ids: Collection[str]) -> None:
    """Counts an image that was erased from datasets for every version that was trained on one."""
    if not dataset_ids:
        return
    marks = ", ".join("?" * len(dataset_ids))
    connection.execute(
        "UPDATE versions SET erased_images = erased_images + 1 WHERE tenant = ? AND EXISTS"  # nosec B608  # noqa: S608 - marks
        " (SELECT 1 FROM version_sources AS s WHERE s.tenant = versions.tenant"
        " AND s.model = versions.model AND s.version = versions.version"
        f" AND s.dataset_id IN ({marks}))",
        (tenant, *dataset_ids),
    )


def trained_on(
    connection: Connection, tenant: str, before_s: Mapping[str, float]
) -> list[tuple[str, int]]:
    """Returns models with numbers of versions that were published on a dataset before its time."""
    found = set()
    for dataset_id, time_s in before_s.items():
        rows = connection.execute(
            "SELECT v.model, v.version FROM version_sources AS s JOIN versions AS v"
            " ON v.tenant = s.tenant AND v.model = s.model AND v.version = s.version"
            " WHERE s.tenant = ? AND s.dataset_id = ? AND v.create_time_s <= ?",
            (tenant, dataset_id, time_s),
        )
        found |= {(row["model"], row["version"]) for row in rows}
    return sorted(found)
