"""What jobs need of each other, and of datasets beside their own."""

import pytest

from service.errors import InvalidInput, NotFound, Reason, WrongState
from service.jobs.store import JobStore
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from tests.unit.jobs.conftest import Queue, request
from tests.unit.jobs.test_store import ALL
from tests.unit.storage.conftest import TENANT
from tests.unit.storage.test_datasets import IMAGES, upload


def unlabelled(datasets: DatasetStore) -> str:
    sending = datasets.begin_upload("target", "", tenant=TENANT, is_unlabelled=True)
    sending.add_image("", b"PIC", "", "")
    return sending.finish().dataset_id


def test_a_target_and_the_data_of_a_base_stay_while_a_job_needs_them(
    jobs: JobStore, datasets: DatasetStore
) -> None:
    own, target, base, grandparent = (
        upload(datasets, [*IMAGES, ("cat", f"PIC {n}".encode(), "")]).dataset_id for n in range(4)
    )
    first, _ = jobs.create(request(server_path="", dataset_id=grandparent), "", b"")
    second, _ = jobs.create(
        request(server_path="", dataset_id=base, base_job_id=first.job_id), "", b""
    )
    third, _ = jobs.create(
        request(
            server_path="", dataset_id=own, target_dataset_id=target, base_job_id=second.job_id
        ),
        "",
        "",
    )
    for job in (first, second):
        jobs.request_cancel(job.job_id, TENANT)
    for dataset_id in (own, target, base, grandparent):
        with pytest.raises(WrongState, match=third.job_id):
            datasets.delete(dataset_id, TENANT)
    jobs.request_cancel(third.job_id, TENANT)
    for dataset_id in (own, target, base, grandparent):
        datasets.delete(dataset_id, TENANT)


def test_a_target_that_a_running_job_took_up_stays(
    jobs: JobStore, queue: Queue, datasets: DatasetStore
) -> None:
    dataset_id = unlabelled(datasets)
    job_id = queue().job_id
    jobs.claim(ALL)
    for _ in range(2):  # an attempt may come again
        jobs.use_target(job_id, dataset_id)
    with pytest.raises(WrongState, match=job_id):
        datasets.delete(dataset_id, TENANT)
    jobs.fail(job_id, Reason.TRAINING_FAILED, "x")
    datasets.delete(dataset_id, TENANT)


def test_images_without_classes_are_a_target_and_nothing_to_learn_from(
    jobs: JobStore, datasets: DatasetStore
) -> None:
    dataset_id = unlabelled(datasets)
    with pytest.raises(InvalidInput, match="upload its images with their classes") as caught:
        jobs.create(request(server_path="", dataset_id=dataset_id), "", b"")
    assert (caught.value.reason, caught.value.field) == (Reason.DATASET_UNUSABLE, "dataset_id")
    jobs.create(request(target_dataset_id=dataset_id), "", b"")
    labelled = upload(datasets, IMAGES).dataset_id
    jobs.create(request(target_dataset_id=labelled), "", b"")
    with pytest.raises(NotFound) as caught_too:
        jobs.create(request(target_dataset_id="ds-0"), "", b"")
    assert caught_too.value.field == "domain_adaptation.target_dataset_id"


def test_ancestors_are_told_oldest_first_and_have_a_bound(database: Database) -> None:
    jobs = JobStore(database, max_queued=1000)

    def grow(base_job_id: str) -> str:
        return jobs.create(request(base_job_id=base_job_id), "", b"")[0].job_id

    made = [""]
    for _ in range(101):
        made.append(grow(made[-1]))
    assert [job.job_id for job in jobs.ancestors(made[3])] == made[1:4]
    assert len(jobs.ancestors(made[100])) == 100
    with pytest.raises(WrongState, match="more than 100") as caught:
        grow(made[101])
    assert (caught.value.reason, caught.value.field) == (Reason.BASE_DATA_GONE, "base")
    with pytest.raises(WrongState, match="not known"):
        jobs.ancestors("job-0")
    assert jobs.ancestors("") == []


def test_a_request_id_is_known_once_it_made_a_job(jobs: JobStore) -> None:
    assert not jobs.is_known("once", TENANT)
    jobs.create(request(), "once", b"f")
    jobs.create(request(), "", b"f")
    assert jobs.is_known("once", TENANT)
    assert not jobs.is_known("", TENANT)


def test_what_waits_is_what_is_queued(jobs: JobStore, queue: Queue) -> None:
    running, waiting = queue().job_id, queue().job_id
    jobs.claim(ALL)
    assert jobs.waiting() == {waiting}
    jobs.requeue(running, "again")
    assert jobs.waiting() == {running, waiting}
