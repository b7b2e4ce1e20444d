"""Processes that put, name and drop blobs while a collector runs without any grace.

`python -m tests.unit.storage.collecting ROLE FOLDER INTENTS SEED`: `write` puts a few contents
again and again, names them by rows, and drops the rows; `collect` collects all the time. Both
count what they did in the table `progress`. Without INTENTS ("off") a blob is put and named as
one would without them: what is in the store is taken to stay there.
"""

import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from service.storage.blob_cache import InPlace
from service.storage.blobs import Blob, BlobFolder, BlobGone, Blobs
from service.storage.collector import Collector
from service.storage.database import Connection, Database

CONTENTS = [f"content {number}".encode() for number in range(6)]


class WithoutIntents(Blobs):
    """Uploads what is missing, then writes the row."""

    def _intend(self, blobs: Iterable[Blob]) -> dict[str, Blob]:
        return {blob.digest: blob for blob in blobs}

    def reference(self, connection: Connection, blobs: Iterable[Blob]) -> None:
        for blob in blobs:
            connection.execute(
                "INSERT INTO blobs (digest, size_bytes, generation, touched_s) VALUES (?, 9, '', ?)"
                " ON CONFLICT (digest) DO UPDATE SET doomed_s = NULL",
                (blob.digest, time.time()),
            )


def count(connection: Connection, what: str, done: int) -> None:
    connection.execute("UPDATE progress SET done = done + ? WHERE what = ?", (done, what))


def write(database: Database, blobs: Blobs, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    work = folder / f"work-{os.getpid()}"
    work.mkdir()
    while True:
        file = work / f"put-{os.getpid()}"
        file.write_bytes(draw.choice(CONTENTS))
        blob: Blob = blobs.put(file)
        try:
            with database.transaction() as connection:
                blobs.reference(connection, [blob])
                connection.execute("INSERT INTO needs (digest) VALUES (?)", (blob.digest,))
                count(connection, "named", 1)
        except BlobGone:
            continue
        with database.transaction() as connection:
            connection.execute("DELETE FROM needs WHERE digest = ?", (blob.digest,))


def main() -> None:
    role, folder, intents, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    database = Database(folder, busy_timeout_s=300, is_exclusive=False)
    store = BlobFolder(folder / "blobs")
    if role == "collect":
        collector = Collector(database, store, grace_s=0)
        while True:
            deleted = collector.run().deleted
            with database.transaction() as connection:
                count(connection, "collected", deleted)
    kind = Blobs if intents == "on" else WithoutIntents
    write(database, kind(database, store, InPlace(store)), folder, seed)


if __name__ == "__main__":
    main()
