"""Headers that are not UTF-8: what gRPC logs of them holds no secrets, and ends nothing."""

import asyncio
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.__main__ import main
from service.ops.logs import GRPC_LINES_PER_SECOND, set_up_logging
from tests.rpc.conftest import GUARD_S, MakeService, Service

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, ACK, END_HEADERS = 1, 1, 4


@pytest.fixture
def _own_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """One HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(text: bytes) -> bytes:
    """A string of at most 126 bytes, not compressed (RFC 7541, 5.2)."""
    assert len(text) <= 126
    return bytes([len(text)]) + text


async def call(
    service: Service, path: str | bytes, headers: Mapping[bytes, bytes], *, is_answered: bool = True
) -> None:
    """Sends an empty request with these headers, byte by byte; returns once it was answered.

    Or, where gRPC answers nothing, once it was read.
    """
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path.encode() if isinstance(path, str) else path,
        b":authority": b"graft",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        **headers,
    }
    block = b"".join(b"\0" + literal(name) + literal(value) for name, value in fields.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", service.app.port)
    try:
        async with asyncio.timeout(GUARD_S):
            writer.write(
                PREFACE
                + frame(SETTINGS)
                + frame(HEADERS, block, END_HEADERS, 1)
                + frame(DATA, bytes(5), END_STREAM, 1)
                + frame(PING, bytes(8))
            )
            kind, flags, last = 0, 0, (HEADERS, END_STREAM) if is_answered else (PING, ACK)
            while not (kind == last[0] and flags & last[1]):
                head = await reader.readexactly(9)
                kind, flags = head[3], head[4]
                await reader.readexactly(int.from_bytes(head[:3]))
    finally:
        writer.close()


def grpcs_own(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["logger"].startswith("grpc")]


@pytest.mark.usefixtures("_own_root_logger")
async def test_a_token_beside_a_byte_that_is_no_utf_8_stands_in_no_log(
    make_service: MakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "access.toml"
    made = ["tokens", "create", "--tenant=acme", "--role=admin", f"--access-file={file}"]
    assert main(made) == 0
    token = capsys.readouterr().out.strip()
    service = await make_service(access_file=file)
    set_up_logging("json", "debug")
    bearer = b"Bearer " + token.encode() + b"\xa0"
    await call(service, "/graft.v1.ModelService/ListModels", {b"authorization": bearer})
    text = capsys.readouterr().err
    # gRPC still says that something was wrong.
    assert grpcs_own(text)
    assert token.split("_", 2)[2] not in text


@pytest.mark.usefixtures("_own_root_logger")
async def test_headers_that_are_no_utf_8_cannot_flood_the_log(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [7.0]
    set_up_logging("json", "info", clock=lambda: now[0])
    headers = {b"x%d" % number: b"\xff" * 100 for number in range(30)}
    for _ in range(10):
        await call(service, "/grpc.health.v1.Health/Check", headers)
    lines = grpcs_own(capsys.readouterr().err)
    assert len(lines) == GRPC_LINES_PER_SECOND
    now[0] = 8.0
    await call(service, "/grpc.health.v1.Health/Check", headers)
    first, *_ = grpcs_own(capsys.readouterr().err)
    assert first["suppressed_before"] >= 10 * len(headers) - GRPC_LINES_PER_SECOND
    assert "\\xff" not in str(lines)


async def test_a_path_that_is_no_utf_8_leaves_the_server_serving(service: Service) -> None:
    for _ in range(2):
        await call(service, b"/x/\xa0", {}, is_answered=False)
    for _ in range(2):
        await call(service, "/grpc.health.v1.Health/Check", {})
