"""Connections that misbehave, byte by byte, and a thousand that just stay."""

import asyncio
import resource
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from graftml_stubs.v1 import fine_tuning_pb2, prediction_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc import message_io
from tests.rpc.conftest import GUARD_S, HANG, SUCCESS, MakeService, Service, colours, image

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS = 1, 4
ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """One HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request_headers(path: str) -> bytes:
    """A call's headers, none of them indexed or compressed (RFC 7541, 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "graft",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


class Wire:
    """One connection, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *frames: bytes) -> None:
        self._writer.write(b"".join(frames))
        await self._writer.drain()

    async def frame(self) -> tuple[int, int, bytes]:
        """The next frame's kind, flags and payload; raises IncompleteReadError at the end."""
        head = await self._reader.readexactly(9)
        size = int.from_bytes(head[:3])
        return head[3], head[4], await self._reader.readexactly(size)

    async def until(self, kind: int, flags: int = 0) -> bytes:
        """The payload of the next frame of a kind, with these flags."""
        async with asyncio.timeout(GUARD_S):
            while True:
                found, with_flags, payload = await self.frame()
                if found == kind and with_flags & flags == flags:
                    return payload

    async def closed(self) -> None:
        """Waits until the server has hung up."""
        async with asyncio.timeout(GUARD_S):
            try:
                while await self._reader.read(65536):
                    pass
            except ConnectionError:
                return

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def wire(service: Service) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.app.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


async def is_serving(service: Service) -> bool:
    stub = health_pb2_grpc.HealthStub(service.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=GUARD_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_who_floods_with_pings_is_sent_away_and_others_are_served(service: Service) -> None:
    async with wire(service) as flood:
        await flood.send(PREFACE, frame(SETTINGS), *[frame(PING, bytes(8))] * 20)
        payload = await flood.until(GOAWAY)
        assert int.from_bytes(payload[4:8]) == ENHANCE_YOUR_CALM
        await flood.closed()
    assert await is_serving(service)


async def test_who_connects_and_says_nothing_or_no_http2_is_hung_up_on(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(message_timeout_s=0.2)
    async with wire(service) as silent, wire(service) as half, wire(service) as garbage:
        await half.send(PREFACE[:10])
        await garbage.send(b"GET / HTTP/1.1\r\nHost: graft\r\n\r\n" + bytes(range(256)) * 10)
        for connection in (garbage, silent, half):
            await connection.closed()
    assert await is_serving(service)


async def test_half_a_request_and_then_silence_ends_and_others_are_served(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = message_io.receive
    # For the message alone: the connection itself has its time.
    monkeypatch.setattr(message_io, "receive", lambda *asked: receive(*asked[:-1], 0.1))
    async with wire(service) as half:
        headers = request_headers("/graft.v1.PredictionService/Predict")
        # A message of 1 MB is announced, 1,000 bytes of it come.
        begun = b"\0" + struct.pack(">I", 10**6) + bytes(1000)
        await half.send(
            PREFACE,
            frame(SETTINGS),
            frame(HEADERS, headers, END_HEADERS, stream=1),
            frame(DATA, begun, stream=1),
        )
        assert await is_serving(service)
        trailers = await half.until(HEADERS, END_STREAM)
        assert b"the request did not arrive within 0.1 s" in trailers
        # The connection is fine; the same stream has ended.
        await half.send(frame(PING, b"8 bytes."))
        assert await half.until(PING, 1) == b"8 bytes."
    assert await is_serving(service)


async def test_headers_that_are_too_large_are_refused_and_others_are_served(
    service: Service,
) -> None:
    import grpc

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.channel.unary_unary("/graft.v1.ModelService/ListModels")(
            b"", metadata=[("x-large", "x" * 100_000)]
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await is_serving(service)


async def test_a_thousand_idle_connections_and_200_watchers_leave_predictions_alone(
    make_service: MakeService,
) -> None:
    idle = 1000
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2 * idle + 500:
        pytest.skip(f"only {most} files may be open here, and both ends of the connections are")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    service: Service = await make_service(SUCCESS, HANG)
    await service.make_model()
    request = fine_tuning_pb2.FineTuneRequest(model="m", inline_images=colours())
    job = (await service.fine_tuning.FineTune(request)).job
    connections = []
    try:
        for _ in range(idle):
            connections.append(await asyncio.open_connection("127.0.0.1", service.app.port))
            connections[-1][1].write(PREFACE + frame(SETTINGS))
        for reader, writer in connections:
            assert (await Wire(reader, writer).frame())[0] == SETTINGS
        watch = fine_tuning_pb2.WatchJobRequest(job_id=job.job_id)
        watchers = [service.fine_tuning.WatchJob(watch) for _ in range(200)]
        for watcher in watchers:
            await watcher.read()
        one = prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours")],
            images=[prediction_pb2.Image(encoded=image("red"))],
        )
        for answer in await asyncio.gather(
            *[service.prediction.Predict(one, timeout=GUARD_S) for _ in range(100)]
        ):
            assert answer.answers[0].results[0].classification.scores[0].label == "red"
        assert await is_serving(service)
        for watcher in watchers:
            watcher.cancel()
    finally:
        for _, writer in connections:
            writer.close()
