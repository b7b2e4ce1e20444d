"""A data folder with a bit of everything in it, for tests of what works on whole ones."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from service.contract import BackbonesRanked, Gate, Progressed
from service.domain import JobKind
from service.errors import Reason
from service.jobs.claims import Claims
from service.jobs.replicas import Replicas
from service.jobs.store import JobRecord, JobStore
from service.storage.blob_cache import InPlace
from service.storage.blobs import BlobFolder, Blobs
from service.storage.changes import Changes
from service.storage.database import Connection, Database
from service.storage.dataset_edits import DatasetEdits
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.registered import BackboneStore
from service.storage.version_rows import NewVersion, Publication
from tests.keys import BIRDS, key
from tests.unit.jobs.conftest import request, to_rank
from tests.unit.storage.conftest import LIMITS, QUOTAS, TENANT, FakeReader, write_result
from tests.unit.storage.test_registered import FakeChecker, register

CAT = b"PIC cat"


def make_data_folder(root: Path) -> Path:
    """Makes a data folder with a bit of everything, through its stores, as a clean stop leaves it.

    `root` is an empty folder.
    """
    data = root / "data"
    database = Database(data)
    store = BlobFolder(data / "blobs")
    blobs = Blobs(database, store, InPlace(store))
    models = ModelStore(database, blobs, Changes(database), QUOTAS)
    keeper = DatasetKeeper(database, blobs, QUOTAS, data / "uploads")
    datasets = DatasetStore(database, keeper, FakeReader(), LIMITS, QUOTAS)
    edits = DatasetEdits(database, keeper, Changes(database), lambda *_: None)
    jobs = JobStore(database, max_queued=100)
    claims, owner = Claims(jobs), Replicas(jobs).register()

    def upload(*images: tuple[str, bytes], **options: Any) -> str:
        sent = datasets.begin_upload("", "", tenant=TENANT, **options)
        for label, content in images:
            sent.add_image(label, content, "", "")
        return sent.finish().dataset_id

    pets = upload(("cat", CAT), ("dog", b"PIC dog"), ("dog", b"PIC dog, to be erased"))
    upload(("cat", CAT), ("dog", b"PIC dog"), is_unlabelled=True)
    more = datasets.begin_adding(pets, "more", "", tenant=TENANT)
    more.add_image("cat", b"PIC another cat", "", "")
    more.finish()
    edits.relabel(pets, {hashlib.sha256(b"PIC dog").hexdigest(): "wolf"}, TENANT)
    edits.erase(hashlib.sha256(b"PIC dog, to be erased").hexdigest(), TENANT)

    def claimed(kind: JobKind = JobKind.FINE_TUNE) -> JobRecord:
        job = claims.claim(owner, kind, ["", "auto"])
        assert job is not None
        claims.append(job, Progressed("training", 0.5))
        return job

    def runs(model: str = "birds") -> JobRecord:
        jobs.create(request(key(model), server_path="", dataset_id=pets), "", b"as it came")
        return claimed()

    def succeeds(model: str, **changes: object) -> None:
        job = runs(model)
        out = write_result(root / job.job_id, job.job_id, model, **changes)  # type: ignore[arg-type]
        new = NewVersion(
            model=key(model), job_id=job.job_id, stored=models.put_result(out), gate=Gate()
        )
        claims.succeed(job, partial(_publish, models, new))

    for _ in range(4):
        succeeds("birds")
    succeeds("ants", weights="random:1", backbone=b"another")
    models.set_alias(BIRDS, "prod", 1)
    models.set_alias(BIRDS, "prod", 2)
    models.roll_back_alias(BIRDS, "latest")
    models.delete_version(BIRDS, 4)
    models.pin(BIRDS, 1)
    succeeds("gone")
    models.delete_model(key("gone"))
    jobs.create(to_rank(server_path="", dataset_id=pets), "", b"")
    claims.succeed_ranking(claimed(JobKind.RANKING), BackbonesRanked([], "", 2))
    claims.fail(runs(), Reason.TRAINING_FAILED, "no")
    claims.cancelled(runs())
    claims.crash(runs(), Reason.TRAINER_CRASHED, "again", 3)
    register(
        BackboneStore(database, blobs, QUOTAS, FakeChecker(), work=data / "tmp", max_bytes=1000)
    )
    database.close()
    return data


def _publish(models: ModelStore, new: NewVersion, connection: Connection) -> Publication:
    return models.publish(connection, new)
