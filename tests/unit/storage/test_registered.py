"""Registered backbones in the store: whose the files are, and what a failure leaves of them."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    Exhausted,
    Expired,
    InvalidInput,
    NotFound,
    OverQuota,
    Reason,
    WrongState,
)
from service.ingest.backbone_process import Asked, Checked
from service.ops import failpoints
from service.storage.blobs import BlobFolder, Blobs
from service.storage.collector import Collector
from service.storage.database import Database
from service.storage.models import ModelStore
from service.storage.registered import BackboneStore, Description, RegisteredBackbone
from service.storage.version_rows import NewVersion
from tests.keys import key
from tests.unit.storage.conftest import QUOTAS, TENANT, digest, write_result

ACME = "acme"
HALF = (0.5, 0.5, 0.5)


Files = Callable[[], list[str]]


class FakeChecker:
    """Takes what begins with NET; what serves is the same behind another word."""

    def __init__(self) -> None:
        self.checked: list[bytes] = []
        self.before: Callable[[], None] = lambda: None

    def check(self, source: Path, target: Path, asked: Asked, go_on: Callable[[], None]) -> Checked:
        """See `Checker`."""
        self.before()
        go_on()
        data = source.read_bytes()
        self.checked.append(data)
        if not data.startswith(b"NET"):
            raise InvalidInput(Reason.BACKBONE_UNUSABLE, "no network")
        target.write_bytes(b"SERVES" + data)
        return Checked(width=7, opset=17)


@pytest.fixture
def checker() -> FakeChecker:
    return FakeChecker()


@pytest.fixture
def backbones(
    database: Database, blobs: Blobs, checker: FakeChecker, tmp_path: Path
) -> BackboneStore:
    return BackboneStore(
        database, blobs, QUOTAS, checker, work=tmp_path / "data" / "tmp", max_bytes=1000
    )


@pytest.fixture
def files(database: Database, store: BlobFolder, tmp_path: Path) -> Files:
    """The digests that are needed; nothing may be left of uploads."""

    def files() -> list[str]:
        work = tmp_path / "data" / "tmp"
        assert not work.exists() or list(work.iterdir()) == []
        Collector(database, store, grace_s=0).run()
        return sorted(name.partition("-")[0] for name in store.names())

    return files


def register(
    store: BackboneStore,
    data: bytes = b"NET",
    tenant: str = TENANT,
    bound: int | None = None,
    **changes: Any,
) -> RegisteredBackbone:
    given = {"name": "tiny", "size": 96, "mean": HALF, "std": HALF, **changes}
    upload = store.begin(Description(**given), tenant=tenant, max_stored_bytes=bound)
    try:
        upload.write(data)
        return upload.finish()
    finally:
        upload.abort()


SERVES = digest(b"SERVESNET")


def test_what_serves_is_stored_by_its_content_and_found_by_jobs(
    backbones: BackboneStore, files: Files, models: ModelStore
) -> None:
    made = register(backbones, licence="MIT")
    assert (made.name, made.digest, made.source_digest) == ("onnx/tiny", SERVES, digest(b"NET"))
    assert (made.width, made.size_bytes) == (7, 9)
    assert files() == [SERVES]
    (pretrained,) = backbones.pretrained(TENANT)
    assert (pretrained.backbone, pretrained.weights) == ("onnx/tiny", f"sha256:{SERVES[:16]}")
    (known,) = pretrained.exported
    assert (known.digest, known.licence) == (SERVES, "MIT")
    assert [e.digest for e in models.exported_backbones("onnx/tiny", TENANT)] == [SERVES]
    assert models.exported_backbones("onnx/tiny", ACME) == []
    assert backbones.pretrained(ACME) == []


def test_the_same_again_is_not_checked_again(
    backbones: BackboneStore, checker: FakeChecker
) -> None:
    assert register(backbones) == register(backbones, name="onnx/tiny")
    assert len(checker.checked) == 1


def test_versions_are_on_it_in_both_forms_and_both_go_with_it(
    backbones: BackboneStore,
    models: ModelStore,
    files: Files,
    database: Database,
    tmp_path: Path,
) -> None:
    made = register(backbones, tenant=ACME)

    def publish(number: int, **changes: Any) -> None:
        job_id, model = f"job-{number}", key(f"m{number}", ACME)
        out = write_result(
            tmp_path / job_id, job_id, model.name, weights=made.weights, head=b"h", **changes
        )
        manifest = json.loads((out / "manifest.json").read_bytes())
        (out / "manifest.json").write_text(json.dumps({**manifest, "backbone": "onnx/tiny"}))
        new = NewVersion(model=model, job_id=job_id, stored=models.put_result(out))
        with database.transaction() as connection:
            models.publish(connection, new)

    publish(1, backbone=None, backbone_digest=SERVES)
    publish(2, backbone=b"int8", serving_precision="int8")
    forms = [(made.weights, SERVES), (f"{made.weights}:int8", digest(b"int8"))]
    for tenant, known in ((ACME, forms), (TENANT, [])):
        found = models.exported_backbones("onnx/tiny", tenant)
        assert [(form.weights, form.digest) for form in found] == known
    (pretrained,) = backbones.pretrained(ACME)
    assert [form.digest for form in pretrained.exported] == [SERVES, digest(b"int8")]
    for model in (key("m1", ACME), key("m2", ACME)):
        with pytest.raises(WrongState, match=r"versions are on it \(version 1 of m"):
            backbones.delete("onnx/tiny", ACME)
        models.delete_model(model)
        # Kept for the jobs to come, though no version needs them.
        assert {SERVES, digest(b"int8")} <= set(files())
    backbones.delete("onnx/tiny", ACME)
    assert files() == []


def test_a_file_goes_with_the_last_who_needs_it(backbones: BackboneStore, files: Files) -> None:
    register(backbones)
    register(backbones, name="twin")
    register(backbones, tenant=ACME)
    for name, tenant in (("tiny", TENANT), ("twin", TENANT)):
        backbones.delete(f"onnx/{name}", tenant)
        assert files() == [SERVES]
    backbones.delete("onnx/tiny", ACME)
    assert files() == []
    with pytest.raises(NotFound):
        backbones.delete("onnx/tiny", ACME)


def test_a_step_that_fails_leaves_nothing(backbones: BackboneStore, files: Files) -> None:
    for point in ("backbone.stored", "database.committing"):
        failpoints.arm(f"full@{point}")
        try:
            with pytest.raises(Exhausted, match="the disk of the data folder is full"):
                register(backbones)
        finally:
            failpoints.arm("")
        assert files() == []
    assert backbones.page("", 10, TENANT) == []
    assert register(backbones).digest == SERVES


def test_of_two_at_once_under_a_name_the_first_stays(
    backbones: BackboneStore, files: Files, checker: FakeChecker
) -> None:
    def meanwhile() -> None:
        checker.before = lambda: None
        register(backbones, b"NET of another")

    checker.before = meanwhile
    with pytest.raises(WrongState, match="is registered already") as caught:
        register(backbones)
    assert caught.value.reason is Reason.BACKBONE_IN_USE
    assert files() == [digest(b"SERVESNET of another")]
    checker.before = lambda: None

    def the_same() -> None:
        checker.before = lambda: None
        register(backbones, name="same")

    checker.before = the_same
    first = register(backbones, name="same")
    assert [b.name for b in backbones.page("", 10, TENANT)] == ["onnx/same", "onnx/tiny"]
    assert first.digest == SERVES


def test_stored_bytes_count_and_bound(backbones: BackboneStore, files: Files) -> None:
    register(backbones, bound=20)
    # The file that came is smaller than the one that is kept.
    with pytest.raises(OverQuota, match="your datasets, versions, backbones and jobs take"):
        register(backbones, b"NETWORK", name="second", bound=20)
    with pytest.raises(OverQuota):
        register(backbones, b"NET" * 7, name="third", bound=20)
    assert files() == [SERVES]
    register(backbones, name="twin", bound=100)


def test_who_has_gone_stores_nothing(
    backbones: BackboneStore, files: Files, checker: FakeChecker
) -> None:
    given = Description(name="tiny", size=96, mean=HALF, std=HALF)
    upload = backbones.begin(given, tenant=TENANT, max_stored_bytes=None)
    upload.write(b"NET")
    checker.before = upload.abandon
    with pytest.raises(Expired, match="the caller has gone"):
        upload.finish()
    assert files() == []


def test_an_upload_may_be_given_up_while_it_is_checked(
    backbones: BackboneStore, files: Files, checker: FakeChecker
) -> None:
    given = Description(name="tiny", size=96, mean=HALF, std=HALF)
    upload = backbones.begin(given, tenant=TENANT, max_stored_bytes=None)
    upload.write(b"NET")
    is_checking, may_go_on = threading.Event(), threading.Event()

    def wait() -> None:
        is_checking.set()
        assert may_go_on.wait(60)

    checker.before = wait
    errors: list[BaseException] = []

    def finish() -> None:
        try:
            upload.finish()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=finish)
    thread.start()
    assert is_checking.wait(60)
    upload.abandon()
    may_go_on.set()
    upload.abort()
    thread.join(60)
    assert [type(error) for error in errors] == [Expired]
    assert files() == []
