"""The audit log: its lines, and how many of them at most."""

import logging
from typing import Any

import grpc
import pytest
from graftml_stubs.v1 import fine_tuning_pb2, model_pb2

from service.auth.audit import REFUSALS_PER_SECOND, Audit, about
from service.auth.principal import EVERYBODY, UNAUTHENTICATED
from service.errors import Reason, Unauthenticated
from service.ops.metrics import Metrics
from service.rpc.open_inference import grpc_predict_v2_pb2

DELETE = "/graft.v1.ModelService/DeleteModel"
SECRET = "s" * 43


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "audit"]


def refuse(
    audit: Audit, token: str = f"graft_ci_{SECRET}", reason: Reason = Reason.TOKEN_UNKNOWN
) -> None:
    audit.refused(
        DELETE,
        Unauthenticated(reason, "no"),
        [("authorization", f"Bearer {token}")],
        request_id="r",
        peer="p",
    )


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def test_a_flood_of_refusals_is_logged_in_part_and_then_summed_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, metrics = Clock(), Metrics({"version": "1"})
    audit = Audit(metrics, clock)
    for _ in range(1000):
        refuse(audit)
    assert len(logged(caplog)) == REFUSALS_PER_SECOND
    clock.now += 1
    refuse(audit)
    assert [line["suppressed_before"] for line in logged(caplog)][-2:] == [
        0,
        1000 - REFUSALS_PER_SECOND,
    ]
    counted = metrics.registry.get_sample_value(
        "graft_refused_calls_total", {"reason": "TOKEN_UNKNOWN"}
    )
    assert counted == 1001


def test_a_flood_of_one_reason_or_of_made_up_ids_hides_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    audit = Audit(Metrics({"version": "1"}), Clock(), lambda token_id: token_id == "real")
    for n in range(100):
        refuse(audit, "", Reason.TOKEN_MISSING)
        refuse(audit, f"graft_guess{n}_{SECRET}")
    refuse(audit, f"graft_real_{SECRET}", Reason.ROLE_MISSING)
    refuse(audit, f"graft_real_{SECRET}")
    assert len(logged(caplog)) == 2 * REFUSALS_PER_SECOND + 2
    last = [(line["reason"], line["token_id"]) for line in logged(caplog)[-2:]]
    assert last == [("ROLE_MISSING", "real"), ("TOKEN_UNKNOWN", "real")]


@pytest.mark.parametrize(
    ("token", "token_id"),
    [
        (f"graft_ci_{SECRET}", "ci"),
        (f"graft_ci_{SECRET[:-5]}_-xyz", "ci"),
        (SECRET, ""),
        (f"graft_{SECRET}", ""),
        (f"ci_{SECRET}", ""),
        (f"graft_CI_{SECRET}", ""),
    ],
)
def test_a_refused_tokens_id_is_logged_where_its_form_is_right_and_its_secret_never(
    caplog: pytest.LogCaptureFixture, token: str, token_id: str
) -> None:
    refuse(Audit(Metrics({"version": "1"})), token)
    (line,) = logged(caplog)
    assert line["token_id"] == token_id
    assert SECRET[:-5] not in repr(line)


def test_reads_and_calls_that_were_not_admitted_are_no_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    audit = Audit(Metrics({"version": "1"}))
    read = "/graft.v1.ModelService/GetModel"
    for method, principal in (
        (read, EVERYBODY),
        (DELETE, UNAUTHENTICATED),
        ("/unheard.Of/It", EVERYBODY),
    ):
        audit.ended(method, principal, grpc.StatusCode.OK, None, None, request_id="r", peer="p")
    assert logged(caplog) == []


def test_what_a_call_was_about_comes_from_request_and_response() -> None:
    images = fine_tuning_pb2.InlineImages()
    start = fine_tuning_pb2.FineTuneRequest(model="ants", inline_images=images)
    job = fine_tuning_pb2.FineTuneResponse(job=fine_tuning_pb2.Job(job_id="job-1"))
    assert about(start, job) == {"model": "ants", "job_id": "job-1"}
    back = model_pb2.RollbackAliasResponse(
        model=model_pb2.Model(name="ants"), from_version=3, to_version=2
    )
    assert about(model_pb2.RollbackAliasRequest(model="ants", alias="prod"), back) == {
        "model": "ants", "alias": "prod", "from_version": 3, "to_version": 2,
    }  # fmt: skip
    load = grpc_predict_v2_pb2.RepositoryModelLoadRequest(model_name="ants")
    assert about(load, None) == {"model": "ants"}
    rank = fine_tuning_pb2.RankBackbonesRequest(dataset_id="ds-1")
    assert about(rank, fine_tuning_pb2.RankBackbonesResponse()) == {"dataset_id": "ds-1"}
    assert about(None, None) == {}


def test_where_an_alias_points_and_which_one_an_empty_name_meant_is_logged() -> None:
    given = model_pb2.SetAliasRequest(model="ants", alias="prod", version=2)
    assert about(given, model_pb2.SetAliasResponse()) == {
        "model": "ants", "alias": "prod", "version": 2,
    }  # fmt: skip
    assert about(model_pb2.RollbackAliasRequest(model="ants"), None)["alias"] == "latest"


def test_what_callers_choose_can_neither_break_a_line_nor_fill_the_log() -> None:
    for name in ("a\nlevel=INFO", "a tenant=other", "a\x1b[31m", "a" * 10_000):
        shown = about(model_pb2.DeleteModelRequest(model=name), None)["model"]
        assert isinstance(shown, str)
        assert shown.isprintable()
        assert len(shown) <= 100
        assert " " not in shown or shown.startswith("'")
