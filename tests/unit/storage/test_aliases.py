import msgspec
import pytest

from service.domain import GateCheck
from service.errors import GraftError, NotFound, OverQuota, Reason, WrongState
from service.storage.database import Database
from service.storage.models import ModelStore
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


def moves(database: Database, model: str) -> list[tuple[str, int]]:
    with database.read() as connection:
        rows = connection.execute(
            "SELECT alias, version FROM alias_moves WHERE model = ? ORDER BY alias, move", (model,)
        )
        return [(row["alias"], row["version"]) for row in rows]


def test_a_version_that_missed_its_gate_is_a_candidate_that_no_alias_moves_to(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1", alias="prod", gate_checks=[MET])
    assert publish("birds", "job-2", alias="prod", gate_checks=[MET, MISSED]) == 2
    assert models.get_model("birds").aliases == {"latest": 1, "prod": 1}
    candidate = models.resolve("birds", 2, None)
    assert candidate.is_candidate
    assert candidate.manifest.gate_failures == ["accuracy 0.5 is below 0.9"]
    assert not models.resolve("birds", None, None).is_candidate
    assert publish("birds", "job-3", alias="prod", gate_checks=[MET]) == 3
    assert models.get_model("birds").aliases == {"latest": 3, "prod": 3}


def test_a_version_that_was_compared_with_what_serves_no_more_is_a_candidate(
    models: ModelStore, publish: Publish
) -> None:
    compared = {"not_worse_than": "latest", "gate_checks": [NOT_WORSE]}
    publish("birds", "job-1", **compared)
    assert publish("birds", "job-2", **compared, incumbent_version=1) == 2
    assert models.get_model("birds").aliases == {"latest": 2}
    for number, before, told in ((3, 1, "version 1"), (4, None, "none")):
        assert publish("birds", f"job-{number}", **compared, incumbent_version=before) == number
        late = models.resolve("birds", number, None)
        assert late.is_candidate
        assert late.manifest.gate_checks[0].verdict == "failed"
        assert late.manifest.gate_failures == [
            "the alias latest moved to version 2 while this version was made: it was compared "
            f"with {told}; promote it, or fine-tune again"
        ]
    assert models.get_model("birds").aliases == {"latest": 2}
    assert publish("birds", "job-4", **compared) == 4


def test_an_alias_that_went_while_a_version_was_made_leaves_nothing_to_be_worse_than(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1", "prod")
    models.delete_alias("birds", "prod")
    publish("birds", "job-2", "", "prod", gate_checks=[NOT_WORSE], incumbent_version=1)
    assert not models.resolve("birds", 2, None).is_candidate


def test_what_was_worse_already_keeps_its_own_reason(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    worse = msgspec.structs.replace(
        NOT_WORSE, verdict="failed", passed=False, detail="3 lost, 0 won"
    )
    publish("birds", "job-2", "", "latest", gate_checks=[worse])
    assert models.resolve("birds", 2, None).manifest.gate_failures == ["3 lost, 0 won"]


def test_a_model_with_candidates_alone_has_no_latest_and_says_what_to_do(
    models: ModelStore, publish: Publish
) -> None:
    for n in (1, 2):
        publish("birds", f"job-{n}", gate_checks=[MISSED])
    assert models.get_model("birds").aliases == {}
    with pytest.raises(NotFound, match=r"candidates \(1, 2\).*PromoteVersion") as caught:
        models.resolve("birds", None, None)
    assert reason_of(caught) is Reason.ALIAS_NOT_FOUND
    with pytest.raises(NotFound, match="it has none"):
        models.resolve("birds", None, "prod")
    assert models.resolve("birds", 2, None).version == 2


def test_promoting_a_candidate_moves_latest_to_it_once(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1", gate_checks=[MISSED])
    publish("birds", "job-2")
    assert models.resolve("birds", None, None).version == 2
    assert models.promote_version("birds", 1).aliases == {"latest": 1}
    promoted = models.resolve("birds", None, None)
    assert (promoted.version, promoted.is_candidate) == (1, False)
    assert promoted.manifest.gate_checks == [MISSED]
    for number in (1, 2):
        with pytest.raises(WrongState, match="published already") as caught:
            models.promote_version("birds", number)
        assert reason_of(caught) is Reason.NOT_A_CANDIDATE
    with pytest.raises(NotFound):
        models.promote_version("birds", 3)
    assert models.roll_back_alias("birds", "latest").to_version == 2


def test_an_alias_may_point_to_a_candidate(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2", gate_checks=[MISSED])
    models.set_alias("birds", "canary", 2)
    assert models.resolve("birds", None, "canary").is_candidate
    with pytest.raises(WrongState, match="canary"):
        models.delete_version("birds", 2)


def test_latest_falls_back_past_candidates_and_goes_when_they_alone_are_left(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2", gate_checks=[MISSED])
    publish("birds", "job-3")
    models.delete_version("birds", 3)
    assert models.get_model("birds").aliases == {"latest": 1}
    models.delete_version("birds", 1)
    assert models.get_model("birds").aliases == {}
    with pytest.raises(WrongState, match="delete the model instead"):
        models.delete_version("birds", 2)
    assert models.promote_version("birds", 2).aliases == {"latest": 2}
    with pytest.raises(WrongState) as caught:
        models.roll_back_alias("birds", "latest")
    assert reason_of(caught) is Reason.NO_EARLIER_VERSION


def test_a_candidate_can_be_deleted_and_latest_stays(models: ModelStore, publish: Publish) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2", gate_checks=[MISSED])
    models.delete_version("birds", 2)
    assert models.get_model("birds").aliases == {"latest": 1}


def test_rolling_back_goes_one_further_each_time_and_publishing_moves_on(
    models: ModelStore, publish: Publish
) -> None:
    for n in (1, 2, 3):
        publish("birds", f"job-{n}")
    assert models.resolve("birds", None, None).version == 3
    done = models.roll_back_alias("birds", "latest")
    assert (done.from_version, done.to_version, done.model.aliases) == (3, 2, {"latest": 2})
    assert models.resolve("birds", None, None).version == 2
    done = models.roll_back_alias("birds", "latest")
    assert (done.from_version, done.to_version) == (2, 1)
    with pytest.raises(WrongState, match="points to version 1") as caught:
        models.roll_back_alias("birds", "latest")
    assert reason_of(caught) is Reason.NO_EARLIER_VERSION
    assert publish("birds", "job-4") == 4
    assert models.roll_back_alias("birds", "latest").to_version == 1


def test_an_alias_rolls_back_along_its_own_moves(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2, 3):
        publish("birds", f"job-{n}")
    for number in (2, 2, 3, 1, 3):
        models.set_alias("birds", "prod", number)
    seen = [models.roll_back_alias("birds", "prod").to_version for _ in range(3)]
    assert seen == [1, 3, 2]
    assert models.get_model("birds").aliases == {"latest": 3, "prod": 2}
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "prod")


def test_a_rollback_passes_over_deleted_versions(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2, 3):
        publish("birds", f"job-{n}")
    for number in (1, 2, 1, 2, 3):
        models.set_alias("birds", "prod", number)
    models.delete_version("birds", 2)
    assert models.roll_back_alias("birds", "latest").to_version == 1
    assert models.roll_back_alias("birds", "prod").to_version == 1
    # What was between is gone, and the other 1 is no earlier place.
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "prod")


def test_where_a_deleted_version_left_latest_is_where_it_rolls_back_from(
    models: ModelStore, publish: Publish
) -> None:
    for n in (1, 2, 3):
        publish("birds", f"job-{n}")
    models.delete_version("birds", 3)
    done = models.roll_back_alias("birds", "latest")
    assert (done.from_version, done.to_version) == (2, 1)


def test_what_is_not_there_cannot_be_rolled_back(models: ModelStore, publish: Publish) -> None:
    with pytest.raises(NotFound) as caught:
        models.roll_back_alias("birds", "latest")
    assert reason_of(caught) is Reason.MODEL_NOT_FOUND
    publish("birds", "job-1")
    with pytest.raises(NotFound) as caught:
        models.roll_back_alias("birds", "prod")
    assert reason_of(caught) is Reason.ALIAS_NOT_FOUND


def test_the_last_hundred_moves_of_each_alias_are_kept(
    models: ModelStore, publish: Publish, database: Database
) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    models.set_alias("birds", "other", 1)
    for n in range(130):
        models.set_alias("birds", "prod", 1 + n % 2)
    kept = moves(database, "birds")
    assert kept.count(("other", 1)) == 1
    assert [move for move in kept if move[0] == "prod"] == [("prod", 1), ("prod", 2)] * 50
    for _ in range(99):
        models.roll_back_alias("birds", "prod")
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "prod")


def test_moves_go_with_their_alias_and_their_model(
    models: ModelStore, publish: Publish, database: Database
) -> None:
    for n in (1, 2):
        publish("birds", f"job-{n}")
        models.set_alias("birds", "prod", n)
    models.delete_alias("birds", "prod")
    assert moves(database, "birds") == [("latest", 1), ("latest", 2)]
    models.set_alias("birds", "prod", 1)
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "prod")
    with pytest.raises(WrongState, match=r"prod \(version 1\)") as caught:
        models.delete_model("birds")
    assert caught.value.reason is Reason.MODEL_IN_USE
    models.delete_model("birds", force=True)
    assert moves(database, "birds") == []
    publish("birds", "job-3")
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "latest")


def test_latest_falls_back_to_where_it_pointed_before_and_never_to_candidates_or_deleted_ones(
    models: ModelStore, publish: Publish
) -> None:
    for number in range(1, 4):
        publish("birds", f"job-{number}")
    publish("birds", "job-4", gate_checks=[MISSED])
    publish("birds", "job-5")
    assert models.fallbacks("birds", None) == models.fallbacks("birds", "latest") == [3, 2, 1]
    models.delete_version("birds", 2)
    assert models.fallbacks("birds", None) == [3, 1]
    models.roll_back_alias("birds", "latest")
    assert models.fallbacks("birds", None) == [1]
    assert models.fallbacks("nobody", None) == []


def test_an_alias_falls_back_where_that_was_said_when_it_was_set_last(
    models: ModelStore, publish: Publish
) -> None:
    for number in range(1, 4):
        publish("birds", f"job-{number}")
    models.set_alias("birds", "prod", 1, falls_back=True)
    moved = models.set_alias("birds", "prod", 3, falls_back=True)
    assert moved.falling_back == ("latest", "prod")
    assert models.fallbacks("birds", "prod") == [1]
    # Publishing moves it and leaves that as it was.
    publish("birds", "job-4", alias="prod")
    assert models.fallbacks("birds", "prod") == [3, 1]
    assert models.set_alias("birds", "prod", 4).falling_back == ("latest",)
    assert models.fallbacks("birds", "prod") == []
    models.delete_alias("birds", "prod")
    assert models.set_alias("birds", "prod", 2, falls_back=True).falling_back == ("latest", "prod")
    assert models.fallbacks("birds", "prod") == []


def test_an_alias_that_pointed_to_a_candidate_does_not_fall_back_to_it_unless_it_was_promoted(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2", gate_checks=[MISSED])
    for number in (2, 1):
        models.set_alias("birds", "prod", number, falls_back=True)
    assert models.fallbacks("birds", "prod") == []
    models.promote_version("birds", 2)
    assert models.fallbacks("birds", "prod") == [2]


def test_a_model_has_so_many_aliases_and_messages_name_a_few(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1")
    publish("birds", "job-2")
    for number in range(99):
        models.set_alias("birds", f"a{number:02}", 1)
    with pytest.raises(OverQuota, match="delete one") as caught:
        models.set_alias("birds", "more", 1)
    assert (caught.value.reason, caught.value.subject) == (Reason.QUOTA_EXCEEDED, "aliases")
    with pytest.raises(OverQuota):
        publish("birds", "job-3", alias="more")
    assert len(models.get_model("birds").aliases) == 100
    with pytest.raises(NotFound, match=r"it has a00, a01, .*, a09 and more$"):
        models.resolve("birds", None, "more")
    with pytest.raises(WrongState, match=r"is called a00, .*, a09 and more: point"):
        models.delete_version("birds", 1)
    # Those that are there move as before.
    assert models.set_alias("birds", "a00", 2).aliases["a00"] == 2
    models.delete_alias("birds", "a01")
    assert publish("birds", "job-3", alias="more") == 3
    assert models.get_model("birds").aliases["more"] == 3


def test_latest_comes_to_a_model_that_has_all_other_aliases(
    models: ModelStore, publish: Publish
) -> None:
    publish("birds", "job-1", gate_checks=[MISSED])
    for number in range(100):
        models.set_alias("birds", f"a{number:02}", 1)
    assert models.promote_version("birds", 1).aliases["latest"] == 1
