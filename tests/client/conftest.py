"""Every test here speaks real gRPC with FakeGraft over localhost.

Where calls are carried out, `client` is the blocking client and the asyncio one in turn. All else
is generated from one source, so that one of them will do.
"""

import asyncio
import io
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.cli import main
from graftml.testing import FakeGraft

Run = Callable[..., tuple[int, str, str]]
"""Runs a command; returns its exit code and what it printed."""

GUARD_S = 60.0
"""Ends what hangs."""

FAST = graftml.RetryPolicy(initial_delay_s=0.001, max_delay_s=0.01, reconnect_for_s=GUARD_S)
"""Retries without a wait worth mentioning."""


class Driven:
    """An asyncio client or job handle that can be used as the blocking one."""

    def __init__(self, driven: Any, runner: asyncio.Runner) -> None:
        self._driven, self._runner = driven, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driven, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            if asyncio.iscoroutine(result):
                result = self._runner.run(result)
            if isinstance(result, AsyncIterator):
                return self._iterate(result)
            own = graftml.AsyncJobHandle | graftml.AsyncRankingHandle | graftml.AsyncClient
            is_own = isinstance(result, own)
            return Driven(result, self._runner) if is_own else result

        return call

    def _iterate(self, items: Any) -> Iterator[Any]:
        async def following() -> tuple[bool, Any]:
            try:
                return True, await anext(items)
            except StopAsyncIteration:
                return False, None

        try:
            while True:
                is_there, item = self._runner.run(following())
                if not is_there:
                    return
                yield item
        finally:
            self._runner.run(items.aclose())


def arrived(messages: list[Any]) -> list[tuple[str, bytes]]:
    """Returns what an upload sent: each image's class and bytes, or each file of its archive.

    Names alone, of folders, links and what is left out, are no files.
    """
    images = [(m.image.label, m.image.content) for m in messages if m.HasField("image")]
    archive = io.BytesIO(b"".join(message.archive_chunk for message in messages))
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            return [(name, zipped.read(name)) for name in zipped.namelist()]
    archive.seek(0)
    if not images:
        with tarfile.open(fileobj=archive) as tar:
            files = [(member.name, tar.extractfile(member)) for member in tar if member.size]
            return [(name, file.read()) for name, file in files if file]
    return images


@pytest.fixture
def server() -> Iterator[FakeGraft]:
    with FakeGraft() as server:
        yield server


Connect = Callable[..., Any]


CARRIED_OUT = {
    *("test_adaptation", "test_connection_errors", "test_coverage", "test_errors"),
    *("test_handed_over", "test_jobs", "test_predict", "test_retry", "test_uploads"),
}
"""Modules of streams, retries, errors, and what is read while it is sent."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "client_kind" in metafunc.fixturenames:
        is_carried_out = metafunc.module.__name__.rpartition(".")[2] in CARRIED_OUT
        metafunc.parametrize("client_kind", ["sync", "async"] if is_carried_out else ["sync"])


@pytest.fixture
def connect(client_kind: str) -> Iterator[Connect]:
    """Makes clients of either kind; closes them."""
    made: list[Any] = []
    with asyncio.Runner() as runner:

        def connect(target: str, **options: Any) -> Any:
            options = {"retry": FAST, "timeout_s": GUARD_S, **options}
            if client_kind == "sync":
                made.append(graftml.Client(target, **options))
            else:

                async def make() -> graftml.AsyncClient:
                    return graftml.AsyncClient(target, **options)

                made.append(Driven(runner.run(make()), runner))
            return made[-1]

        yield connect
        for client in made:
            client.close()


@pytest.fixture
def client(connect: Connect, server: FakeGraft) -> Any:
    """Typed as Any: one of two kinds with the same methods."""
    return connect(server.target)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three files each, and what an upload must leave out."""
    root = tmp_path / "pets"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for number in range(3):
            (root / label / f"{number}.jpg").write_bytes(f"{label} {number}".encode() * 100)
    (root / "cat" / ".hidden").write_text("x")
    (root / ".cache").mkdir()
    (root / ".cache" / "thumb.jpg").write_text("x")
    (root / "dog" / "link.jpg").symlink_to(root / "cat" / "0.jpg")
    return root


@pytest.fixture
def run(server: FakeGraft, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against the server; returns its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments), "--server", server.target])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
