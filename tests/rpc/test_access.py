"""Tokens, roles, quotas and the audit log, over a socket with a real client."""

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import graftml
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from graftml_stubs.v1 import dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.__main__ import main
from service.auth import access_control
from service.config import BadConfig
from service.errors import Reason
from tests.rpc.conftest import GUARD_S, MakeService, Service, colours, image, refusal
from tests.rpc.test_server import scrape
from tests.rpc.test_wire import settled

Connect = Callable[..., graftml.AsyncClient]

RELOAD_FAILED = 'graft_reloads_total{outcome="failed",what="access_file"} 1.0'


class Keys:
    """An access file, and the tokens that were made for it with the command."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys
        self.made: dict[str, str] = {}

    def make(self, name: str, tenant: str, *roles: str) -> str:
        flags = [f"--role={role}" for role in roles]
        flags += [f"--tenant={tenant}", f"--id={name}", f"--access-file={self.path}"]
        assert main(["tokens", "create", *flags]) == 0
        self.made[name] = self._capsys.readouterr().out.strip()
        return self.made[name]

    def revoke(self, name: str) -> None:
        assert main(["tokens", "revoke", name, f"--access-file={self.path}"]) == 0
        self._capsys.readouterr()

    def expire(self, name: str) -> None:
        """Has a token expire in a second, which is long after the file was read again."""
        line = f'id = "{name}"'
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
        expires = f"expires = {at.isoformat()}"
        self.replace(self.path.read_text().replace(line, f"{line}\n{expires}"))

    def bound(self, tenant: str, line: str) -> None:
        at = f"[tenants.{tenant}]"
        self.replace(self.path.read_text().replace(at, f"{at}\n{line}"))

    def replace(self, content: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(content)
        new.chmod(0o600)
        new.replace(self.path)


@pytest.fixture
def keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Keys:
    monkeypatch.setattr(access_control, "POLL_EVERY_S", 0.02)
    keys = Keys(tmp_path / "access.toml", capsys)
    keys.make("acme-all", "acme", "admin")
    keys.make("acme-asks", "acme", "predict")
    keys.make("acme-trains", "acme", "train")
    return keys


@pytest.fixture
async def guarded(make_service: MakeService, keys: Keys) -> Service:
    made: Service = await make_service(access_file=keys.path)
    return made


@pytest.fixture
async def connect(keys: Keys) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def to(service: Service, name: str, **options: Any) -> graftml.AsyncClient:
            return stack.push_async_exit(
                graftml.AsyncClient(
                    f"127.0.0.1:{service.app.port}",
                    token=keys.made.get(name, name),
                    retry=options.pop("retry", graftml.NO_RETRY),
                    timeout_s=GUARD_S,
                    **options,
                )
            )

        yield to


async def until_refused(ask: Callable[[], Any]) -> graftml.NotAllowed:
    """Asks until it is refused."""
    async with asyncio.timeout(GUARD_S):
        while True:
            try:
                await ask()
            except graftml.NotAllowed as error:
                return error


async def until_scraped(service: Service, line: str) -> None:
    """Waits until the metrics have a line."""
    async with asyncio.timeout(GUARD_S):
        while line not in await scrape(service):
            pass


def audit(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [vars(r) for r in caplog.records if r.name == "audit" and r.getMessage() == message]


async def test_health_needs_no_token(guarded: Service) -> None:
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_without_a_token_every_kind_of_call_is_refused(guarded: Service) -> None:
    # Nothing is sent: who sends to a call that has ended may lose the server's status in grpc.aio.
    uploads = guarded.datasets.UploadDataset()
    stream = guarded.prediction.PredictStream()
    for call in (
        guarded.models.ListModels(model_pb2.ListModelsRequest()),
        guarded.fine_tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id="x")),
        uploads,
        stream,
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            Reason.TOKEN_MISSING,
        )
    call = reflection_pb2_grpc.ServerReflectionStub(guarded.channel).ServerReflectionInfo()
    assert (await refusal(call)).reason == Reason.TOKEN_MISSING


async def test_any_token_may_ask_what_there_is(guarded: Service, keys: Keys) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    listed = reflection_pb2.ServerReflectionRequest(list_services="")
    bearer = [("authorization", f"Bearer {keys.made['acme-asks']}")]
    answer = await stub.ServerReflectionInfo(iter([listed]), metadata=bearer).read()
    assert answer.list_services_response.service


async def test_a_wrong_secret_and_an_unknown_token_are_refused_alike(
    guarded: Service, keys: Keys, connect: Connect
) -> None:
    good = keys.made["acme-all"]
    texts = set()
    for bad in (good[:-1] + ("A" if good[-1] != "A" else "B"), "graft_nobody_" + "x" * 43, "junk"):
        with pytest.raises(graftml.NotAllowed) as caught:
            await connect(guarded, bad).get_model("m")
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.reason == graftml.Reason.TOKEN_UNKNOWN
        texts.add(caught.value.message)
    assert len(texts) == 1


async def test_a_call_with_two_authorization_headers_is_refused(
    guarded: Service, keys: Keys
) -> None:
    good = ("authorization", f"Bearer {keys.made['acme-all']}")
    bad = ("authorization", f"Bearer {keys.made['acme-all'][:-6]}xxxxxx")
    empty = ("authorization", "")
    for metadata in ([bad, good], [good, bad], [empty, good], [good, good]):
        call = guarded.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            Reason.TOKEN_UNKNOWN,
        )
        assert "2 authorization headers" in refused.message


async def test_a_role_allows_what_it_is_for_and_nothing_else(
    guarded: Service, connect: Connect
) -> None:
    trains, asks = connect(guarded, "acme-trains"), connect(guarded, "acme-asks")
    pairs = [(p.label, p.content) for p in colours().images]
    await (await trains.fine_tune(pairs, "ants")).wait()
    found = await asks.predict([image("red")], "ants")
    assert found[0].label == "red"
    assert (await asks.get_model("ants")).name == "ants"
    for refused in (
        asks.fine_tune("ds-x", "ants"),
        asks.set_alias("ants", "prod", 1),
        asks.delete_model("ants"),
        trains.predict([image("red")], "ants"),
        trains.delete_version("ants", 1),
    ):
        with pytest.raises(graftml.NotAllowed) as caught:
            await refused
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        assert caught.value.reason == graftml.Reason.ROLE_MISSING
        assert "needs a token with the role" in caught.value.message
    await connect(guarded, "acme-all").delete_model("ants")


async def test_calls_past_the_quota_are_refused_with_the_time_to_come_back(
    make_service: MakeService, keys: Keys, connect: Connect
) -> None:
    keys.bound("acme", "calls_per_second = 0.001")
    service = await make_service(access_file=keys.path)
    bearer = [("authorization", f"Bearer {keys.made['acme-all']}")]
    request = model_pb2.ListModelsRequest()
    await service.models.ListModels(request, metadata=bearer)
    with pytest.raises(aio.AioRpcError) as caught:
        await service.models.ListModels(request, metadata=bearer)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    status = status_pb2.Status.FromString(packed)  # type: ignore[arg-type]
    for detail in status.details:
        for message in (quota, retry):
            detail.Unpack(message)
    assert [v.subject for v in quota.violations] == ["calls_per_second"]
    # Less what has passed since the call before.
    assert 0 < retry.retry_delay.ToMilliseconds() <= 1_000_000
    with pytest.raises(graftml.ResourceExhausted) as refused:
        await connect(service, "acme-all").get_model("m")
    assert refused.value.reason == graftml.Reason.QUOTA_EXCEEDED
    assert refused.value.retry_after_s == pytest.approx(1000, abs=2 * GUARD_S)


async def test_the_client_waits_for_its_quota_by_itself(
    make_service: MakeService, keys: Keys, connect: Connect
) -> None:
    keys.bound("acme", "calls_per_second = 4")
    service = await make_service(access_file=keys.path)
    client = connect(service, "acme-all", retry=graftml.RetryPolicy())
    for _ in range(5):
        assert [model async for model in client.list_models()] == []


async def test_a_token_that_is_revoked_stops_working_and_a_new_one_works(
    guarded: Service, keys: Keys, connect: Connect
) -> None:
    client, other = connect(guarded, "acme-all"), connect(guarded, "acme-asks")
    with pytest.raises(graftml.NotFound):
        await client.get_model("m")
    keys.make("late", "acme", "admin")
    keys.revoke("acme-all")

    async def ask() -> None:
        with pytest.raises(graftml.NotFound):
            await client.get_model("m")

    refused = await until_refused(ask)
    assert refused.reason == graftml.Reason.TOKEN_UNKNOWN
    for still_good in (other, connect(guarded, "late")):
        with pytest.raises(graftml.NotFound):
            await still_good.get_model("m")
    # What is no good changes nothing.
    keys.replace("[tenants.")
    await until_scraped(guarded, RELOAD_FAILED)
    with pytest.raises(graftml.NotFound):
        await other.get_model("m")


@pytest.mark.parametrize(
    ("end", "reason"),
    [(Keys.revoke, Reason.TOKEN_UNKNOWN), (Keys.expire, Reason.TOKEN_EXPIRED)],
)
async def test_a_stream_ends_with_its_token(
    guarded: Service,
    keys: Keys,
    connect: Connect,
    end: Callable[[Keys, str], None],
    reason: Reason,
) -> None:
    trains = connect(guarded, "acme-trains")
    pairs = [(p.label, p.content) for p in colours().images]
    await (await trains.fine_tune(pairs, "ants")).wait()
    asked = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="ants")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    )
    bearer = [("authorization", f"Bearer {keys.made['acme-asks']}")]
    stream = guarded.prediction.PredictStream(metadata=bearer)

    await stream.write(prediction_pb2.PredictStreamRequest(request=asked))
    assert await stream.read() is not aio.EOF
    end(keys, "acme-asks")
    # Without a further request: a client that is writing just then may see its own gRPC's
    # INTERNAL in place of the status.
    async with asyncio.timeout(GUARD_S):
        refused = await refusal(stream.read())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    with pytest.raises(graftml.NotAllowed) as caught:
        await connect(guarded, "acme-asks").get_model("ants")
    assert caught.value.reason == reason.value


async def test_an_upload_ends_when_its_token_is_revoked_and_leaves_nothing(
    guarded: Service, keys: Keys
) -> None:
    bearer = [("authorization", f"Bearer {keys.made['acme-all']}")]
    upload = guarded.datasets.UploadDataset(metadata=bearer)
    header = dataset_pb2.UploadDatasetHeader(display_name="d")
    await upload.write(dataset_pb2.UploadDatasetRequest(header=header))
    folder = guarded.data_dir / "uploads"
    await settled(lambda: list(folder.iterdir()) != [])
    keys.revoke("acme-all")
    async with asyncio.timeout(GUARD_S):
        assert (await refusal(upload)).reason == Reason.TOKEN_UNKNOWN
    assert not list(folder.iterdir())


async def test_a_file_that_is_no_good_keeps_the_server_from_starting(
    make_service: MakeService, keys: Keys
) -> None:
    keys.path.chmod(0o666)
    with pytest.raises(BadConfig, match="can be written by others"):
        await make_service(access_file=keys.path)
    keys.replace("[tenants.acme]\nstored_gb = 1\n")
    with pytest.raises(BadConfig, match="stored_gb"):
        await make_service(access_file=keys.path)


async def test_changes_are_audited_with_who_and_what_and_reads_are_not(
    guarded: Service, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "audit")
    client = connect(guarded, "acme-all", metadata=[("x-request-id", "mine")])
    pairs = [(p.label, p.content) for p in colours().images]
    dataset = await client.upload_dataset(pairs)
    job = await client.fine_tune(dataset, "ants")
    await job.wait()
    await client.set_alias("ants", "prod", 1)
    await client.predict([image("red")], "ants")
    await client.get_report("ants")
    with pytest.raises(graftml.NotFound):
        await client.delete_version("bees", 7)
    told = audit(caplog, "change")
    assert [(t["method"].rpartition("/")[2], t["code"]) for t in told] == [
        ("UploadDataset", "OK"),
        ("FineTune", "OK"),
        ("SetAlias", "OK"),
        ("DeleteVersion", "NOT_FOUND"),
    ]
    for line in told:
        who = line["tenant"], line["principal"], line["request_id"]
        assert who == ("acme", "acme-all", "mine")
        assert line["peer"].startswith("ipv4:127.0.0.1:")
    upload, start, alias, delete = told
    assert upload["dataset_id"] == start["dataset_id"] == dataset.dataset_id
    assert (start["model"], start["job_id"]) == ("ants", job.job_id)
    assert (alias["model"], alias["alias"], alias["version"]) == ("ants", "prod", 1)
    assert (delete["model"], delete["version"]) == ("bees", 7)


async def test_without_an_access_file_changes_are_audited_too(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "audit")
    await refusal(service.models.DeleteModel(model_pb2.DeleteModelRequest(model="a\nb c")))
    (line,) = audit(caplog, "change")
    assert (line["tenant"], line["principal"]) == ("default", "anonymous")
    assert line["model"] == r"'a\nb c'"


async def test_refused_calls_are_logged_and_counted(
    guarded: Service, keys: Keys, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "audit")
    wrong = connect(guarded, keys.made["acme-all"][:-6] + "x" * 6)
    with pytest.raises(graftml.NotAllowed):
        await wrong.delete_model("m")
    (line,) = audit(caplog, "refused")
    assert (line["reason"], line["token_id"]) == ("TOKEN_UNKNOWN", "acme-all")
    assert line["method"].endswith("/DeleteModel")
    for _ in range(20):
        with pytest.raises(graftml.NotAllowed):
            await connect_call(wrong)
    with pytest.raises(graftml.NotAllowed):
        await connect(guarded, "acme-asks").delete_model("m")
    assert audit(caplog, "change") == []
    text = await scrape(guarded)
    assert 'graft_refused_calls_total{reason="TOKEN_UNKNOWN"} 21.0' in text
    assert 'graft_refused_calls_total{reason="ROLE_MISSING"} 1.0' in text


async def test_a_call_that_was_admitted_and_may_not_go_on_counts_as_refused_once(
    guarded: Service, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "audit")
    method = "/graft.v1.ModelService/GetModel"
    bearer = [("authorization", f"Bearer {keys.made['acme-asks']}")]
    release = asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        await release.wait()
        yield model_pb2.GetModelRequest(model="m").SerializeToString()

    half_sent = guarded.channel.stream_unary(method)(late(), metadata=bearer)
    stream = guarded.prediction.PredictStream(metadata=bearer)
    for name in (method, "/graft.v1.PredictionService/PredictStream"):
        await until_scraped(guarded, f'graft_rpc_active{{method="{name}"}} 1.0')
    keys.revoke("acme-asks")
    assert (await refusal(stream)).reason == Reason.TOKEN_UNKNOWN
    release.set()
    assert (await refusal(half_sent)).reason == Reason.TOKEN_UNKNOWN
    assert 'graft_refused_calls_total{reason="TOKEN_UNKNOWN"} 2.0' in await scrape(guarded)
    told = audit(caplog, "refused")
    assert [(t["method"].rpartition("/")[2], t["token_id"]) for t in told] == [
        ("PredictStream", "acme-asks"),
        ("GetModel", "acme-asks"),
    ]


async def connect_call(client: graftml.AsyncClient) -> None:
    await client.get_model("m")


async def test_no_token_stands_in_logs_or_metrics_whatever_the_level(
    guarded: Service, keys: Keys, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "graft_acme-all_" + "W" * 43
    for name in ("acme-all", "acme-asks", wrong, "half-a-token"):
        for ask in (connect_call, lambda c: c.delete_model("m"), lambda c: c.upload_dataset([])):
            with pytest.raises(graftml.GraftError):
                await ask(connect(guarded, name))
    keys.replace(keys.path.read_text() + "\n[[tokens]]\nid = 'x'\n")
    await until_scraped(guarded, RELOAD_FAILED)
    said = caplog.text + "".join(repr(vars(record)) for record in caplog.records)
    assert "acme-all" in said
    secrets = [token.split("_", 2)[2] for token in (*keys.made.values(), wrong)]
    for secret in (*secrets, "half-a-token"):
        assert secret not in said + await scrape(guarded)
