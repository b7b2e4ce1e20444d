"""Versions that did not reach what they must, and bases that are not there."""

from typing import Any

import graftml
import pytest
from graftml import _answers
from graftml.testing import FakeGraft, note, published, running, succeeded
from graftml_stubs.v1 import model_pb2 as pb

DATA = graftml.ServerPath("/images")
WORSE = "worse than version 1 on the same images, p = 0.003"


def test_a_script_says_which_version_is_a_candidate(connect: Any) -> None:
    script = [running(), note("looking"), published(0.97, gate_failures=[WORSE]), succeeded()]
    with FakeGraft(script=script) as server:
        server.add_model("pets")
        client = connect(server.target)
        told: list[graftml.JobEvent] = []
        job = client.fine_tune(DATA, "pets", gate=graftml.Gate(not_worse_than="latest"))
        version = job.wait(on_event=told.append)
        assert (version.version, version.is_candidate, version.aliases) == (2, True, ())
        [check] = version.gate_checks
        assert (check.verdict, check.passed, check.detail) == ("failed", False, WORSE)
        [out] = [e.payload for e in told if isinstance(e.payload, graftml.VersionPublished)]
        assert (out.version, out.is_candidate, out.gate_failures) == (2, True, (WORSE,))
        assert client.predict(b"x", "pets")[0].version == 1
        assert client.promote_version("pets", 2).aliases == {"latest": 2}
        assert not client.get_version("pets").is_candidate


def test_a_check_that_cannot_be_told_is_read() -> None:
    undecided = pb.GateCheck(name="accuracy", verdict=pb.GATE_VERDICT_UNDECIDED, passed=True)
    undecided.images_needed = 40
    [check] = _answers.version(pb.Version(gate_checks=[undecided])).gate_checks
    assert (check.verdict, check.value, check.passed) == ("undecided", None, True)
    assert check.images_needed == 40


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
