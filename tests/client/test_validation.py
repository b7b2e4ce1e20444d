"""Requests that the server can refuse without the images are refused before an upload."""

from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.cli import main
from graftml.testing import FakeGraft

REFUSED = graftml.FailedPrecondition("no GPU here", reason=graftml.Reason.DEVICE_UNAVAILABLE)


def methods(server: FakeGraft) -> list[str]:
    return [call.method for call in server.calls]


def test_a_request_is_checked_before_its_images_are_sent(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    client.fine_tune(folder, "pets", seed=3, labels={"a": "b"})
    assert methods(server) == ["FineTune", "UploadDataset", "FineTune"]
    check, request = server.requests("FineTune")
    assert (check.validate_only, check.WhichOneof("data")) == (True, None)
    assert request.dataset_id
    request.ClearField("dataset_id")
    check.ClearField("validate_only")
    assert check == request


def test_nothing_is_sent_of_what_is_refused(client: Any, server: FakeGraft, folder: Path) -> None:
    server.fail("FineTune", REFUSED)
    server.fail("RankBackbones", REFUSED)
    with pytest.raises(graftml.FailedPrecondition, match="no GPU here"):
        client.fine_tune(folder, "pets", device="cuda")
    with pytest.raises(graftml.FailedPrecondition, match="no GPU here"):
        client.rank_backbones(folder)
    assert methods(server) == ["FineTune", "RankBackbones"]


def test_what_is_on_the_server_already_is_checked_once(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    client.fine_tune(dataset, "pets")
    client.rank_backbones(dataset)
    assert methods(server)[:3] == ["UploadDataset", "FineTune", "RankBackbones"]


def test_a_target_that_is_sent_is_waited_for_with_the_check(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    method = graftml.DomainAdaptation(target=folder)
    client.fine_tune(dataset, "pets", method=method)
    check, request = server.requests("FineTune")
    assert check.dataset_id == dataset.dataset_id
    assert check.domain_adaptation.WhichOneof("target") is None
    assert request.domain_adaptation.target_dataset_id
    with pytest.raises(graftml.NotFound):
        client.fine_tune("ds-unknown", "pets", method=method)
    assert methods(server)[-1] == "FineTune"


def test_a_repeated_request_id_passes_the_check_and_finds_its_job(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    first = client.fine_tune(folder, "pets", request_id="once")
    again = client.fine_tune(folder, "pets", request_id="once")
    assert first.job_id == again.job_id
    assert len(list(client.list_jobs())) == 1


def test_the_command_sends_nothing_of_what_is_refused(
    server: FakeGraft, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("FineTune", REFUSED)
    command = ["finetune", str(folder), "--name", "pets", "--device", "cuda"]
    assert main([*command, "--server", server.target]) == 1
    assert capsys.readouterr().err == "graft: no GPU here [DEVICE_UNAVAILABLE]\n"
    assert methods(server) == ["FineTune"]
