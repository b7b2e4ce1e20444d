import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import GraftError, InvalidInput, NotFound, Reason, WrongState
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.models import ModelStore
from service.storage.records import Removed
from tests.unit.storage.conftest import GUARD_S, TENANT, Publish, digest, write_result


def reason_of(error: pytest.ExceptionInfo[GraftError]) -> Reason:
    return error.value.reason


def test_publishing_numbers_versions_and_moves_latest(models: ModelStore, publish: Publish) -> None:
    assert [publish("birds", f"job-{n}") for n in (1, 2, 3)] == [1, 2, 3]
    record = models.get_model("birds")
    assert record.aliases == {"latest": 3}
    assert record.version_count == 3
    assert record.create_time_s <= record.update_time_s
    version = models.get_version("birds", None, None)
    assert (version.version, version.job_id, version.aliases) == (3, "job-3", ("latest",))
    assert version.files.head_path.read_bytes() == b"head of job-3"
    assert version.manifest.classes == ["cat", "dog"]


def test_publishing_for_a_job_twice_makes_one_version(models: ModelStore, publish: Publish) -> None:
    assert publish("birds", "job-1") == 1
    assert publish("birds", "job-1") == 1
    assert models.get_model("birds").version_count == 1


def test_a_rolled_back_publish_is_as_if_it_never_was(
    database: Database, artifacts: Artifacts, models: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    publish("birds", "job-1")
    before = models.resolve("birds", None, None)
    stored = artifacts.put(write_result(tmp_path / "b", "job-2"))

    def fail() -> None:
        with database.transaction() as connection:
            models.publish(connection, "birds", "job-2", stored)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert models.get_version("birds", None, None) == before == models.resolve("birds", None, None)


def test_after_a_crash_between_files_and_row_the_old_version_serves_and_the_files_are_swept(
    database: Database, artifacts: Artifacts, publish: Publish, tmp_path: Path
) -> None:
    publish("birds", "job-1")
    orphan = artifacts.put(write_result(tmp_path / "b", "job-2", backbone=b"other"))
    again = ModelStore(database, artifacts)
    record = again.resolve("birds", None, None)
    assert record.version == 1
    assert record.files.head_path.exists()
    assert record.files.backbone_path.exists()
    assert not orphan.head_path.exists()
    assert not orphan.backbone_path.exists()
    assert publish("birds", "job-2", backbone=b"other") == 2


def test_a_number_is_never_given_twice(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    models.delete_version("birds", 2)
    assert publish("birds", "job-3") == 3


def test_a_deleted_model_takes_its_numbers_along(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    models.delete_model("birds")
    with pytest.raises(NotFound):
        models.get_model("birds")
    assert publish("birds", "job-3") == 1


def test_latest_falls_back_to_the_newest_that_is_left(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2, 3):
        publish("birds", f"job-{n}")
    models.delete_version("birds", 2)
    assert models.get_model("birds").aliases == {"latest": 3}
    models.delete_version("birds", 3)
    assert models.get_model("birds").aliases == {"latest": 1}


def test_the_last_version_goes_only_with_its_model(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    with pytest.raises(WrongState, match="delete the model instead") as caught:
        models.delete_version("birds", 1)
    assert reason_of(caught) is Reason.ALIAS_IN_USE


def test_a_version_that_an_alias_points_to_stays(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    models.set_alias("birds", "prod", 1)
    with pytest.raises(WrongState, match="prod") as caught:
        models.delete_version("birds", 1)
    assert reason_of(caught) is Reason.ALIAS_IN_USE
    models.delete_alias("birds", "prod")
    models.delete_version("birds", 1)


def test_an_alias_moves_and_resolves(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    assert models.set_alias("birds", "prod", 1).aliases == {"latest": 2, "prod": 1}
    assert models.resolve("birds", None, "prod").version == 1
    models.set_alias("birds", "prod", 2)
    assert models.resolve("birds", None, "prod").version == 2
    assert models.resolve("birds", 2, None).aliases == ("latest", "prod")
    assert models.delete_alias("birds", "prod").aliases == {"latest": 2}
    with pytest.raises(NotFound, match="it has latest") as caught:
        models.resolve("birds", None, "prod")
    assert reason_of(caught) is Reason.ALIAS_NOT_FOUND


@pytest.mark.parametrize("alias", ["", "Prod", "7", "-x", "a" * 64])
def test_a_bad_alias_is_refused(models: ModelStore, publish: Publish, alias: str) -> None:
    publish("birds", "job-1")
    with pytest.raises(InvalidInput) as caught:
        models.set_alias("birds", alias, 1)
    assert caught.value.field == "alias"


def test_latest_is_moved_by_publishing_alone(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    for change in (lambda: models.set_alias("birds", "latest", 1),
                   lambda: models.delete_alias("birds", "latest")):  # fmt: skip
        with pytest.raises(WrongState) as caught:
            change()
        assert reason_of(caught) is Reason.ALIAS_RESERVED


def test_what_is_not_there_is_told_with_what_is(models: ModelStore, publish: Publish) -> None:
    with pytest.raises(NotFound, match="there are no models yet"):
        models.get_model("birds")
    publish("birds", "job-1")
    publish("birds", "job-2")
    with pytest.raises(NotFound, match="did you mean birds") as caught:
        models.resolve("bird", None, None)
    assert reason_of(caught) is Reason.MODEL_NOT_FOUND
    with pytest.raises(NotFound, match="its versions are 1, 2") as caught:
        models.resolve("birds", 9, None)
    assert reason_of(caught) is Reason.VERSION_NOT_FOUND
    for missing in (lambda: models.set_alias("birds", "x", 9),
                    lambda: models.delete_version("birds", 9)):  # fmt: skip
        with pytest.raises(NotFound):
            missing()
    with pytest.raises(NotFound):
        models.list_versions("bears", 0, "")
    with pytest.raises(InvalidInput):
        models.get_model("")


def test_a_deletion_is_heard_of_once_it_is_committed_and_not_before(
    models: ModelStore, publish: Publish
) -> None:
    heard: list[Removed] = []
    models.on_removed = heard.append
    publish("cats", "job-1")
    publish("cats", "job-2")
    first = models.delete_version("cats", 1)
    with pytest.raises(WrongState):
        models.delete_version("cats", 2)
    assert heard == [first]
    second = models.delete_model("cats")
    assert heard == [first, second]


def test_the_files_of_one_of_two_equal_heads_are_told_as_deleted(
    models: ModelStore, publish: Publish
) -> None:
    for job_id in ("job-1", "job-2"):
        publish("birds", job_id, head=b"same", backbone=b"shared")
    first = models.get_version("birds", 1, None)
    removed = models.delete_version("birds", 1)
    assert (removed.heads, removed.paths) == ([], [first.files.head_path])


def test_deleting_frees_what_no_version_needs_and_nothing_else(
    models: ModelStore, publish: Publish
) -> None:
    for job_id, model, head, backbone in (
        ("job-1", "birds", b"h1", b"tuned"),
        ("job-2", "birds", b"h2", b"shared"),
        ("job-3", "bears", b"h3", b"shared"),
    ):
        publish(model, job_id, head=head, backbone=backbone, method="model_based")
    paths = {v: models.get_version("birds", v, None) for v in (1, 2)}
    removed = models.delete_version("birds", 1)
    assert (removed.backbones, removed.heads) == ([digest(b"tuned")], [digest(b"h1")])
    assert removed.paths == [paths[1].files.backbone_path, paths[1].files.head_path]
    assert not paths[1].files.head_path.exists()
    assert not paths[1].files.backbone_path.exists()
    removed = models.delete_model("birds")
    assert (removed.backbones, removed.heads) == ([], [digest(b"h2")])
    assert removed.paths == [paths[2].files.head_path]
    assert paths[2].files.backbone_path.exists()
    assert models.resolve("bears", None, None).files.head_path.exists()


def test_an_exported_backbone_stays_known_without_versions(
    database: Database, artifacts: Artifacts, models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1", backbone=b"pretrained")
    removed = models.delete_model("birds")
    assert removed.backbones == [digest(b"pretrained")]
    (exported,) = ModelStore(database, artifacts).exported_backbones("efficientnet_lite0", TENANT)
    assert exported.weights == "IMAGENET1K_V1"
    assert Path(exported.path).read_bytes() == b"pretrained"
    assert publish("birds", "job-2", backbone=None, backbone_digest=exported.digest) == 1


@pytest.mark.parametrize(
    "changes", [{"method": "model_based"}, {"weights": "random:3"}], ids=["tuned", "random"]
)
def test_a_backbone_that_is_not_pretrained_is_not_offered_again(
    models: ModelStore, publish: Publish, changes: dict[str, str]
) -> None:
    publish("birds", "job-1", **changes)
    assert models.exported_backbones("efficientnet_lite0", TENANT) == []


def test_models_and_versions_are_listed_in_pages_without_gaps(
    models: ModelStore, publish: Publish
) -> None:
    for n in range(5):
        publish(f"m{n}", f"job-m{n}")
        publish("birds", f"job-b{n}")
    names: list[str] = []
    token = ""
    while True:
        page, token = models.list_models(2, token, TENANT)
        names += [model.name for model in page]
        if not token:
            break
    assert names == ["birds", "m0", "m1", "m2", "m3", "m4"]
    first, token = models.list_versions("birds", 3, "")
    models.delete_version("birds", 3)
    rest, last = models.list_versions("birds", 3, token)
    assert [v.version for v in first + rest] == [5, 4, 3, 2, 1]
    assert last == ""


def test_a_report_is_the_one_that_training_wrote_with_the_version_in_it(
    models: ModelStore, publish: Publish
) -> None:
    for n in (1, 2):
        publish("birds", f"job-{n}")
    record = models.get_version("birds", 2, None)
    assert models.report(record, html=True) == b"<p>job-2</p>"
    assert json.loads(models.report(record, html=False)) == {
        "job": "job-2",
        "version": 2,
        "is_candidate": False,
        "gate_failures": [],
    }


def test_counts_say_what_there_is(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("bears", "job-2")
    models.set_alias("bears", "prod", 1)
    assert models.counts() == {"models": 2, "versions": 2, "aliases": 3, "backbones": 1}


def test_a_look_up_that_was_asked_before_reads_no_database(
    models: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("birds", "job-1")
    first = models.resolve("birds", None, None)

    def fail(*_: object) -> None:
        raise AssertionError("the database was read")

    monkeypatch.setattr(models, "get_version", fail)
    assert models.resolve("birds", None, None) is first


def test_a_look_up_that_a_publish_overtakes_is_not_remembered(
    models: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("birds", "job-1")
    read, go_on = threading.Event(), threading.Event()
    original = models.get_version

    def slow(*asked: object) -> object:
        record = original(*asked)  # type: ignore[arg-type]
        read.set()
        assert go_on.wait(GUARD_S)
        return record

    monkeypatch.setattr(models, "get_version", slow)
    with ThreadPoolExecutor(1) as pool:
        stale = pool.submit(models.resolve, "birds", None, None)
        assert read.wait(GUARD_S)
        publish("birds", "job-2")
        go_on.set()
        assert stale.result(GUARD_S).version == 1
        assert models.resolve("birds", None, None).version == 2


def test_a_delete_beside_publishes_never_takes_their_backbone(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-0", method="model_based")

    def churn(who: int) -> None:
        for n in range(20):
            publish(f"m{who}", f"job-{who}-{n}", method="model_based", backbone=b"same")
            record = models.get_version(f"m{who}", None, None)
            assert record.files.backbone_path.read_bytes() == b"same"
            assert record.files.head_path.exists()
            models.delete_model(f"m{who}")

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(churn, who) for who in range(2)]:
            done.result(GUARD_S)
