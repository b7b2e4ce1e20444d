"""Versions that must reach something, those that did not, and the ways back and forth."""

from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.testing import FakeGraft, note, published, running, succeeded

DATA = graftml.ServerPath("/images")
WORSE = "worse than version 1 on the same images, p = 0.003"


def test_a_version_that_passes_its_gate_is_published_and_its_alias_moves(
    client: Any, server: FakeGraft
) -> None:
    gate = graftml.Gate(
        min_accuracy=0.9,
        min_class_recall=0.5,
        not_worse_than="latest",
        max_parity_difference=0.01,
        max_latency_ms=20.0,
        alias="prod",
    )
    version = client.fine_tune(DATA, "pets", gate=gate).wait()
    assert not version.is_candidate
    assert version.aliases == ("latest", "prod")
    assert [check.name for check in version.gate_checks] == [
        "accuracy", "class_recall", "not_worse", "parity", "latency",
    ]  # fmt: skip
    assert all(check.passed for check in version.gate_checks)
    assert (version.gate_checks[0].value, version.gate_checks[0].bound) == (0.95, 0.9)


def test_a_version_that_fails_its_gate_is_waited_for_and_is_a_candidate(
    client: Any, server: FakeGraft
) -> None:
    server.add_model("pets")
    told: list[graftml.JobEvent] = []
    job = client.fine_tune(DATA, "pets", gate=graftml.Gate(min_accuracy=0.99, alias="prod"))
    version = job.wait(on_event=told.append)
    assert (version.version, version.is_candidate, version.aliases) == (2, True, ())
    [check] = version.gate_checks
    assert (check.name, check.passed, check.value, check.bound) == ("accuracy", False, 0.95, 0.99)
    assert check.verdict == "failed"
    [out] = [e.payload for e in told if isinstance(e.payload, graftml.VersionPublished)]
    assert (out.version, out.is_candidate, out.gate_failures) == (2, True, (check.detail,))
    assert client.get_model("pets").aliases == {"latest": 1}
    assert client.predict(b"x", "pets")[0].version == 1
    assert client.predict(b"x", "pets", version=2)[0].version == 2


def test_a_script_says_which_version_is_a_candidate(connect: Any) -> None:
    script = [running(), note("looking"), published(0.97, gate_failures=[WORSE]), succeeded()]
    with FakeGraft(script=script) as server:
        client = connect(server.target)
        gate = graftml.Gate(not_worse_than="latest")
        versions = [client.fine_tune(DATA, "pets", gate=gate).wait() for _ in range(2)]
        assert [version.is_candidate for version in versions] == [True, True]
        failed = [c for c in versions[1].gate_checks if not c.passed]
        assert [(c.name, c.detail) for c in failed] == [("not_worse", WORSE)]
        with pytest.raises(graftml.NotFound) as caught:
            client.predict(b"x", "pets")
        assert caught.value.reason == graftml.Reason.ALIAS_NOT_FOUND


@pytest.mark.parametrize("when_uncertain", ["hold", "promote"])
def test_what_cannot_be_told_is_held_unless_the_gate_says_otherwise(
    connect: Any, when_uncertain: Any
) -> None:
    with FakeGraft(script=[running(), published(None), succeeded()]) as server:
        client = connect(server.target)
        gate = graftml.Gate(min_accuracy=0.9, when_uncertain=when_uncertain)
        version = client.fine_tune(DATA, "pets", gate=gate).wait()
        [check] = version.gate_checks
        assert (check.verdict, check.value) == ("undecided", None)
        assert check.passed == (when_uncertain == "promote") == (not version.is_candidate)
        assert (version.headline, version.calibrated) == (None, False)
        assert not client.predict(b"x", "pets", version=1)[0].calibrated


def test_a_gate_that_compares_with_nothing_is_refused(client: Any, server: FakeGraft) -> None:
    client.fine_tune(DATA, "cats", gate=graftml.Gate(not_worse_than="prod")).wait()
    with pytest.raises(graftml.NotFound) as missing:
        client.fine_tune(DATA, "cats", gate=graftml.Gate(not_worse_than="lastest"))
    assert missing.value.reason == graftml.Reason.ALIAS_NOT_FOUND
    assert [each.field for each in missing.value.violations] == ["gate.not_worse_than"]
    client.fine_tune(DATA, "cats", gate=graftml.Gate(not_worse_than="prod", alias="prod")).wait()
    client.fine_tune(DATA, "cats", gate=graftml.Gate(not_worse_than="prod")).wait()
    with pytest.raises(graftml.InvalidArgument) as alone:
        client.fine_tune(DATA, "cats", gate=graftml.Gate(max_regression=0.03))
    assert [each.field for each in alone.value.violations] == ["gate.max_regression"]


def test_a_version_without_a_gate_has_no_checks(client: Any, server: FakeGraft) -> None:
    version = client.fine_tune(DATA, "pets").wait()
    assert (version.is_candidate, version.gate_checks) == (False, ())


def test_a_candidate_is_promoted_once(client: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    client.fine_tune(DATA, "pets", gate=graftml.Gate(min_accuracy=0.99)).wait()
    assert client.promote_version("pets", 2).aliases == {"latest": 2}
    assert not client.get_version("pets").is_candidate
    with pytest.raises(graftml.FailedPrecondition) as caught:
        client.promote_version("pets", 2)
    assert caught.value.reason == graftml.Reason.NOT_A_CANDIDATE
    assert client.rollback_alias("pets").to_version == 1


def test_an_alias_goes_back_step_by_step_to_its_first_version(
    client: Any, server: FakeGraft
) -> None:
    server.add_model("pets", versions=3)
    back = client.rollback_alias("pets")
    assert (back.from_version, back.to_version) == (3, 2)
    assert back.model == client.get_model("pets")
    assert back.model.aliases == {"latest": 2}
    assert client.rollback_alias("pets", "latest").to_version == 1
    with pytest.raises(graftml.FailedPrecondition) as caught:
        client.rollback_alias("pets")
    assert caught.value.reason == graftml.Reason.NO_EARLIER_VERSION
    server.add_model("pets")
    assert client.get_model("pets").aliases == {"latest": 4}


def test_an_alias_of_the_callers_own_goes_back_past_what_was_deleted(
    client: Any, server: FakeGraft
) -> None:
    server.add_model("pets", versions=4)
    for number in (1, 2, 2, 3):
        client.set_alias("pets", "prod", number)
    client.delete_version("pets", 2)
    back = client.rollback_alias("pets", "prod")
    assert (back.from_version, back.to_version) == (3, 1)
    assert back.model.aliases == {"latest": 4, "prod": 1}


def test_an_alias_that_was_deleted_remembers_nothing(client: Any, server: FakeGraft) -> None:
    server.add_model("pets", versions=2)
    client.set_alias("pets", "prod", 1)
    client.set_alias("pets", "prod", 2)
    client.delete_alias("pets", "prod")
    with pytest.raises(graftml.NotFound) as caught:
        client.rollback_alias("pets", "prod")
    assert caught.value.reason == graftml.Reason.ALIAS_NOT_FOUND
    client.set_alias("pets", "prod", 2)
    with pytest.raises(graftml.FailedPrecondition):
        client.rollback_alias("pets", "prod")


def test_latest_falls_back_to_what_is_published_and_goes_with_the_last_of_it(
    client: Any, server: FakeGraft
) -> None:
    server.add_model("pets", versions=2)
    client.fine_tune(DATA, "pets", gate=graftml.Gate(min_accuracy=0.99)).wait()
    client.delete_version("pets", 2)
    assert client.get_model("pets").aliases == {"latest": 1}
    client.delete_version("pets", 1)
    assert client.get_model("pets").aliases == {}


def test_a_model_grows_by_the_classes_of_its_base(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    first = client.fine_tune([("horse", b"1"), ("cow", b"2")], "pets").wait()
    grown = client.fine_tune(folder, "pets", base=first.version).wait()
    assert grown.classes == ("cat", "cow", "dog", "horse")
    of_another = graftml.BaseVersion(model="pets", alias="latest")
    other = client.fine_tune([("hen", b"1"), ("cat", b"2")], "farm", base=of_another).wait()
    assert other.classes == ("cat", "cow", "dog", "hen", "horse")


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (9, graftml.Reason.VERSION_NOT_FOUND),
        ("prod", graftml.Reason.ALIAS_NOT_FOUND),
        (graftml.BaseVersion(model="nope"), graftml.Reason.MODEL_NOT_FOUND),
    ],
)
def test_a_base_that_is_not_there_is_named(
    client: Any, server: FakeGraft, base: Any, reason: graftml.Reason
) -> None:
    server.add_model("pets")
    with pytest.raises(graftml.NotFound) as caught:
        client.fine_tune(DATA, "pets", base=base)
    assert caught.value.reason == reason
