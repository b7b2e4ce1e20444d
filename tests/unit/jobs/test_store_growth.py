"""What jobs need of datasets beside their own."""

import pytest

from service.domain import VersionSource
from service.errors import InvalidInput, NotFound, Reason, WrongState
from service.jobs.claims import Claims
from service.jobs.store import JobStore
from service.storage.datasets import DatasetStore
from tests.unit.jobs.conftest import Claim, Queue, request
from tests.unit.storage.conftest import TENANT
from tests.unit.storage.test_datasets import IMAGES, upload


def unlabelled(datasets: DatasetStore) -> str:
    sending = datasets.begin_upload("target", "", tenant=TENANT, is_unlabelled=True)
    sending.add_image("", b"PIC", "", "")
    return sending.finish().dataset_id


def test_a_target_and_the_data_of_a_base_stay_while_a_job_needs_them(
    jobs: JobStore, datasets: DatasetStore
) -> None:
    own, target, *base = needed = [
        upload(datasets, [*IMAGES, ("cat", f"PIC {n}".encode(), "")]).dataset_id for n in range(4)
    ]
    job, _ = jobs.create(
        request(
            server_path="",
            dataset_id=own,
            target_dataset_id=target,
            base_sources=[VersionSource("source", each) for each in base],
        ),
        "",
        b"",
    )
    for dataset_id in needed:
        with pytest.raises(WrongState, match=job.job_id):
            datasets.delete(dataset_id, TENANT)
    jobs.request_cancel(job.job_id, TENANT)
    for dataset_id in needed:
        datasets.delete(dataset_id, TENANT)


def test_a_target_that_a_running_job_took_up_stays(
    queue: Queue, claims: Claims, claim: Claim, datasets: DatasetStore
) -> None:
    dataset_id = unlabelled(datasets)
    queue()
    job = claim()
    assert job is not None
    with pytest.raises(InvalidInput):
        claims.hold(job, dataset_id)
    for _ in range(2):  # an attempt may come again
        claims.hold(job, dataset_id, is_target=True)
    with pytest.raises(WrongState, match=job.job_id):
        datasets.delete(dataset_id, TENANT)
    claims.fail(job, Reason.TRAINING_FAILED, "x")
    datasets.delete(dataset_id, TENANT)
    with pytest.raises(NotFound):
        datasets.get(dataset_id, TENANT)


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


def test_a_request_id_is_known_once_it_made_a_job(jobs: JobStore) -> None:
    assert not jobs.is_known("once", TENANT)
    jobs.create(request(), "once", b"f")
    jobs.create(request(), "", b"f")
    assert jobs.is_known("once", TENANT)
    assert not jobs.is_known("", TENANT)
