"""The client covers the contract: every call of its services, in both kinds of client."""

from pathlib import Path
from typing import Any

import graftml
import grpc
import pytest
from graftml._channel import Patience
from graftml._rpcs import METHODS
from graftml.testing import FakeGraft, running


def test_every_call_of_the_contract_is_made_by_a_method_of_the_client(
    client: Any, server: FakeGraft, folder: Path, tmp_path: Path
) -> None:
    job = client.fine_tune(folder, "pets")
    version = job.wait()
    assert (version.model, version.version, version.classes) == ("pets", 1, ("cat", "dog"))
    assert client.get_job(job.job_id).state == "SUCCEEDED"
    assert [j.job_id for j in client.list_jobs(states="succeeded", model="pets")] == [job.job_id]
    assert list(client.list_jobs(model="other")) == []

    dataset_id = job.job.request.dataset_id
    assert client.get_dataset(dataset_id).image_count == 6
    assert [d.dataset_id for d in client.list_datasets()] == [dataset_id]
    assert client.add_images(dataset_id, [("dog", b"new")]).dataset_id != dataset_id
    images = list(client.list_images(dataset_id))
    assert client.relabel_images(dataset_id, {images[0].digest: "dog"}).dataset_id != dataset_id
    assert client.remove_images(dataset_id, [images[0].digest]).dataset_id != dataset_id
    assert len(client.erase_image(images[0].digest).dataset_ids) == 4
    assert client.rank_backbones(dataset_id).image_count == 6

    server.add_model("pets", versions=2)
    assert client.get_model("pets").aliases == {"latest": 3}
    assert [m.name for m in client.list_models()] == ["pets"]
    assert [v.version for v in client.list_versions("pets")] == [3, 2, 1]
    assert client.set_alias("pets", "prod", 1).aliases == {"latest": 3, "prod": 1}
    assert client.get_version("pets", alias="prod").job_id == job.job_id
    assert client.get_version("pets", version=1).aliases == ("prod",)
    assert client.delete_alias("pets", "prod").aliases == {"latest": 3}
    assert client.rollback_alias("pets").to_version == 2
    assert client.promote_version("pets", 3).aliases == {"latest": 3}
    assert client.delete_version("pets", 3) is None
    assert client.get_report("pets", version=1)["accuracy"] == 0.95
    assert client.get_report_html("pets").startswith("<!doctype html>")
    exported = client.export_model("pets", tmp_path / "pets.onnx", version=2)
    assert exported.read_bytes() == b"fake onnx of pets 2\n" * 200

    assert client.predict(b"x", "pets", version=1)[0].version == 1
    assert [p.model for p in client.predict_stream([b"x"], "pets")] == ["pets"]

    assert client.delete_model("pets") is None
    assert list(client.list_models()) == []
    assert client.delete_job(job.job_id) is None
    assert client.delete_dataset(dataset_id) is None

    file = tmp_path / "tiny.onnx"
    file.write_bytes(b"a network")
    colour = (0.5, 0.5, 0.5)
    made = client.register_backbone(file, "tiny", size=96, mean=colour, std=colour)
    assert [b.name for b in client.list_backbones()] == ["efficientnet_lite0", made.name]
    assert client.delete_backbone("tiny") is None

    names = {method.name for method in METHODS.values()}
    assert names - {call.method for call in server.calls} == {"CancelJob"}


def test_a_queued_job_is_cancelled_at_once(connect: Any) -> None:
    with FakeGraft(script=()) as server:
        job = connect(server.target).fine_tune(graftml.ServerPath("/data"), "pets")
        assert job.cancel().state == "CANCELLED"
        assert job.job.end_time is not None


def test_a_running_job_is_cancelled_soon(connect: Any) -> None:
    with FakeGraft(script=[running()]) as server:
        job = connect(server.target).fine_tune(graftml.ServerPath("/data"), "pets")
        answer = job.cancel()
        assert (answer.state, answer.cancel_requested) == ("RUNNING", True)
        assert job.refresh().state == "CANCELLED"


def test_lists_are_read_page_by_page_to_their_end(client: Any, server: FakeGraft) -> None:
    names = [f"model-{number:03}" for number in range(250)]
    for name in names:
        server.add_model(name)
    assert [model.name for model in client.list_models()] == names
    assert len(server.requests("ListModels")) == 3


def test_a_list_asks_for_no_page_that_is_not_needed(client: Any, server: FakeGraft) -> None:
    for number in range(250):
        server.add_model(f"model-{number:03}")
    assert next(iter(client.list_models())).name == "model-000"
    assert len(server.requests("ListModels")) == 1


def test_a_token_and_metadata_travel_with_every_call(connect: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    client = connect(server.target, token="secret", metadata=[("x-team", "blue")])
    client.get_model("pets")
    list(client.predict_stream([b"x"], "pets"))
    assert {call.metadata["authorization"] for call in server.calls} == {"Bearer secret"}
    assert {call.metadata["x-team"] for call in server.calls} == {"blue"}


def test_a_channel_of_the_callers_own_is_used_and_left_open(server: FakeGraft) -> None:
    server.add_model("pets")
    with grpc.insecure_channel(server.target) as channel:
        with graftml.Client(channel=channel) as client:
            assert client.get_model("pets").name == "pets"
        with graftml.Client(channel=channel) as client:
            assert client.get_model("pets").name == "pets"


def test_a_server_is_waited_for(connect: Any) -> None:
    server = FakeGraft()
    server.start()
    client = connect(server.target)
    assert client.is_serving()
    client.wait_ready(5.0)
    server.is_serving = False
    assert not client.is_serving()
    server.stop()
    assert not client.is_serving()


def test_a_server_that_never_serves_is_not_waited_for_longer_than_asked(
    client: Any, server: FakeGraft
) -> None:
    server.is_serving = False
    with pytest.raises(graftml.DeadlineExceeded, match=r"was not ready within 0\.2 s: "):
        client.wait_ready(0.2)
    assert Patience("host:1", 2.0).gave_up("").message == (
        "host:1 was not ready within 2 s: it answers, but does not serve"
    )
