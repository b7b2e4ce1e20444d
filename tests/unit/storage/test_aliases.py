import msgspec
import pytest

from service.domain import GateCheck, ModelKey
from service.errors import GraftError, NotFound, OverQuota, Reason, WrongState
from service.storage.database import Database
from service.storage.models import ModelStore
from tests.keys import BIRDS
from tests.unit.storage.conftest import Publish

NOT_WORSE = GateCheck(
    name="not_worse", verdict="passed", passed=True, value=0.0, bound=-0.03, detail="0 lost"
)
MISSED = GateCheck(
    name="accuracy", verdict="failed", passed=False, value=0.5, bound=0.9,
    detail="accuracy 0.5 is below 0.9",
)  # fmt: skip
MET = GateCheck(
    name="parity", verdict="passed", passed=True, value=0.0, bound=0.001, detail="parity is fine"
)


def reason_of(error: pytest.ExceptionInfo[GraftError]) -> Reason:
    return error.value.reason


def moves(database: Database, model: ModelKey) -> list[tuple[str, int]]:
    with database.read() as connection:
        rows = connection.execute(
            "SELECT alias, version FROM alias_moves WHERE tenant = ? AND model = ?"
            " ORDER BY alias, move",
            model,
        )
        return [(row["alias"], row["version"]) for row in rows]


def test_a_version_that_missed_its_gate_is_a_candidate_that_no_alias_moves_to(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1", alias="prod", gate_checks=[MET])
    assert publish(BIRDS, "job-2", alias="prod", gate_checks=[MET, MISSED]) == 2
    assert models.get_model(BIRDS).aliases == {"latest": 1, "prod": 1}
    candidate = models.get_version(BIRDS, 2, None)
    assert candidate.is_candidate
    assert candidate.gate_failures == ["accuracy 0.5 is below 0.9"]
    assert not models.get_version(BIRDS, None, None).is_candidate
    assert publish(BIRDS, "job-3", alias="prod", gate_checks=[MET]) == 3
    assert models.get_model(BIRDS).aliases == {"latest": 3, "prod": 3}


def test_a_version_that_was_compared_with_what_serves_no_more_is_a_candidate(
    models: ModelStore, publish: Publish
) -> None:
    compared = {"not_worse_than": "latest", "gate_checks": [NOT_WORSE]}
    publish(BIRDS, "job-1", **compared)
    assert publish(BIRDS, "job-2", **compared, incumbent_version=1) == 2
    assert models.get_model(BIRDS).aliases == {"latest": 2}
    for number, before, told in ((3, 1, "version 1"), (4, None, "none")):
        assert publish(BIRDS, f"job-{number}", **compared, incumbent_version=before) == number
        late = models.get_version(BIRDS, number, None)
        assert late.is_candidate
        assert late.gate_checks[0].verdict == "failed"
        assert late.gate_failures == [
            "the alias latest moved to version 2 while this version was made: it was compared "
            f"with {told}; promote it, or fine-tune again"
        ]
    assert models.get_model(BIRDS).aliases == {"latest": 2}
    assert publish(BIRDS, "job-4", **compared) == 4


def test_an_alias_that_went_while_a_version_was_made_leaves_nothing_to_be_worse_than(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1", "prod")
    models.delete_alias(BIRDS, "prod")
    publish(BIRDS, "job-2", "", "prod", gate_checks=[NOT_WORSE], incumbent_version=1)
    assert not models.get_version(BIRDS, 2, None).is_candidate


def test_what_was_worse_already_keeps_its_own_reason(models: ModelStore, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    worse = msgspec.structs.replace(
        NOT_WORSE, verdict="failed", passed=False, detail="3 lost, 0 won"
    )
    publish(BIRDS, "job-2", "", "latest", gate_checks=[worse])
    assert models.get_version(BIRDS, 2, None).gate_failures == ["3 lost, 0 won"]


def test_promoting_a_candidate_moves_latest_to_it_once(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1", gate_checks=[MISSED])
    publish(BIRDS, "job-2")
    assert models.get_version(BIRDS, None, None).version == 2
    assert models.promote_version(BIRDS, 1).aliases == {"latest": 1}
    promoted = models.get_version(BIRDS, None, None)
    assert (promoted.version, promoted.is_candidate) == (1, False)
    assert models.manifest(promoted).gate_checks == [MISSED]
    for number in (1, 2):
        with pytest.raises(WrongState, match="published already") as caught:
            models.promote_version(BIRDS, number)
        assert reason_of(caught) is Reason.NOT_A_CANDIDATE
    with pytest.raises(NotFound):
        models.promote_version(BIRDS, 3)
    assert models.roll_back_alias(BIRDS, "latest").to_version == 2


def test_an_alias_may_point_to_a_candidate(models: ModelStore, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2", gate_checks=[MISSED])
    models.set_alias(BIRDS, "canary", 2)
    assert models.get_version(BIRDS, None, "canary").is_candidate
    with pytest.raises(WrongState, match="canary"):
        models.delete_version(BIRDS, 2)


def test_latest_falls_back_past_candidates_and_goes_when_they_alone_are_left(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2", gate_checks=[MISSED])
    publish(BIRDS, "job-3")
    models.delete_version(BIRDS, 3)
    assert models.get_model(BIRDS).aliases == {"latest": 1}
    models.delete_version(BIRDS, 1)
    assert models.get_model(BIRDS).aliases == {}
    with pytest.raises(WrongState, match="delete the model instead"):
        models.delete_version(BIRDS, 2)
    assert models.promote_version(BIRDS, 2).aliases == {"latest": 2}
    with pytest.raises(WrongState) as caught:
        models.roll_back_alias(BIRDS, "latest")
    assert reason_of(caught) is Reason.NO_EARLIER_VERSION


def test_a_candidate_can_be_deleted_and_latest_stays(models: ModelStore, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2", gate_checks=[MISSED])
    models.delete_version(BIRDS, 2)
    assert models.get_model(BIRDS).aliases == {"latest": 1}


def test_an_alias_rolls_back_along_its_own_moves(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2, 3):
        publish(BIRDS, f"job-{n}")
    for number in (2, 2, 3, 1, 3):
        models.set_alias(BIRDS, "prod", number)
    seen = [models.roll_back_alias(BIRDS, "prod").to_version for _ in range(3)]
    assert seen == [1, 3, 2]
    assert models.get_model(BIRDS).aliases == {"latest": 3, "prod": 2}
    with pytest.raises(WrongState):
        models.roll_back_alias(BIRDS, "prod")


def test_a_rollback_passes_over_deleted_versions(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2, 3):
        publish(BIRDS, f"job-{n}")
    for number in (1, 2, 1, 2, 3):
        models.set_alias(BIRDS, "prod", number)
    models.delete_version(BIRDS, 2)
    assert models.roll_back_alias(BIRDS, "latest").to_version == 1
    assert models.roll_back_alias(BIRDS, "prod").to_version == 1
    # What was between is gone, and the other 1 is not an earlier place.
    with pytest.raises(WrongState):
        models.roll_back_alias(BIRDS, "prod")


def test_where_a_deleted_version_left_latest_is_where_it_rolls_back_from(
    models: ModelStore, publish: Publish
) -> None:
    for n in (1, 2, 3):
        publish(BIRDS, f"job-{n}")
    models.delete_version(BIRDS, 3)
    done = models.roll_back_alias(BIRDS, "latest")
    assert (done.from_version, done.to_version) == (2, 1)


def test_what_is_not_there_cannot_be_rolled_back(models: ModelStore, publish: Publish) -> None:
    with pytest.raises(NotFound) as caught:
        models.roll_back_alias(BIRDS, "latest")
    assert reason_of(caught) is Reason.MODEL_NOT_FOUND
    publish(BIRDS, "job-1")
    with pytest.raises(NotFound) as caught:
        models.roll_back_alias(BIRDS, "prod")
    assert reason_of(caught) is Reason.ALIAS_NOT_FOUND


def test_the_last_hundred_moves_of_each_alias_are_kept(
    models: ModelStore, publish: Publish, database: Database
) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2")
    models.set_alias(BIRDS, "other", 1)
    for n in range(130):
        models.set_alias(BIRDS, "prod", 1 + n % 2)
    kept = moves(database, BIRDS)
    assert kept.count(("other", 1)) == 1
    assert [move for move in kept if move[0] == "prod"] == [("prod", 1), ("prod", 2)] * 50
    for _ in range(99):
        models.roll_back_alias(BIRDS, "prod")
    with pytest.raises(WrongState):
        models.roll_back_alias(BIRDS, "prod")


def test_moves_go_with_their_alias_and_their_model(
    models: ModelStore, publish: Publish, database: Database
) -> None:
    for n in (1, 2):
        publish(BIRDS, f"job-{n}")
        models.set_alias(BIRDS, "prod", n)
    models.delete_alias(BIRDS, "prod")
    assert moves(database, BIRDS) == [("latest", 1), ("latest", 2)]
    models.set_alias(BIRDS, "prod", 1)
    with pytest.raises(WrongState):
        models.roll_back_alias(BIRDS, "prod")
    with pytest.raises(WrongState, match=r"prod \(version 1\)") as caught:
        models.delete_model(BIRDS)
    assert caught.value.reason is Reason.MODEL_IN_USE
    models.delete_model(BIRDS, force=True)
    assert moves(database, BIRDS) == []
    publish(BIRDS, "job-3")
    with pytest.raises(WrongState):
        models.roll_back_alias(BIRDS, "latest")


def test_a_model_has_so_many_aliases_and_messages_name_a_few(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2")
    for number in range(99):
        models.set_alias(BIRDS, f"a{number:02}", 1)
    with pytest.raises(OverQuota, match="delete one") as caught:
        models.set_alias(BIRDS, "more", 1)
    assert (caught.value.reason, caught.value.subject) == (Reason.QUOTA_EXCEEDED, "aliases")
    with pytest.raises(OverQuota):
        publish(BIRDS, "job-3", alias="more")
    assert len(models.get_model(BIRDS).aliases) == 100
    with pytest.raises(NotFound, match=r"it has a00, a01, .*, a09 and more$"):
        models.get_version(BIRDS, None, "more")
    with pytest.raises(WrongState, match=r"is called a00, .*, a09 and more: point"):
        models.delete_version(BIRDS, 1)
    # Those that are there move as before.
    assert models.set_alias(BIRDS, "a00", 2).aliases["a00"] == 2
    models.delete_alias(BIRDS, "a01")
    assert publish(BIRDS, "job-3", alias="more") == 3
    assert models.get_model(BIRDS).aliases["more"] == 3


def test_latest_comes_to_a_model_that_has_all_other_aliases(
    models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1", gate_checks=[MISSED])
    for number in range(100):
        models.set_alias(BIRDS, f"a{number:02}", 1)
    assert models.promote_version(BIRDS, 1).aliases["latest"] == 1
