"""The largest requests of every method hold up nobody: the event loop does no work of their size.

Counted in bytecodes that run on the event loop within one of its turns, so that a slow machine
changes nothing. Every method of every service is asked, as the descriptors name them, and every
field that may be long is made as long as the limits let pass. What C code does in one call is
not seen: protobuf's parser, a copy of bytes.
"""

import asyncio
import sys
from asyncio import events
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from graftml_stubs.v1 import backbone_pb2, model_pb2
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.ops import logs
from service.rpc import message_io
from service.rpc.server import SERVICES
from tests.rpc.conftest import GUARD_S, Service, services
from tests.rpc.test_hostile_requests import BASES, upload_around

MOST_BYTECODES = 125_000
"""In one turn of the loop: some milliseconds. Counting `message_io.LOOP_ELEMENTS` is the most."""
MAX_MESSAGE_MB = 1
_MAX_DEPTH = 4
_ROOM_BYTES = 512
"""Left of a message's limit for what surrounds the field under test."""

METHODS = [
    method
    for name in (
        *SERVICES,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name,
    )
    for method in descriptor_pool.Default().FindServiceByName(name).methods
]
PATHS = {f"/{m.containing_service.full_name}/{m.name}": m for m in METHODS}

Path = tuple[FieldDescriptor, ...]


class Turns:
    """Counts the bytecodes of each turn in which the loop works for a call of the server."""

    def __init__(self) -> None:
        self.worst = 0
        self._count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts until its end."""
        run = events.Handle._run

        def counting(handle: Any) -> None:
            if not _is_of_a_call(handle):
                run(handle)
                return
            before, self._count = sys.gettrace(), 0
            sys.settrace(self._trace)
            try:
                run(handle)
            finally:
                sys.settrace(before)
                self.worst = max(self.worst, self._count)

        events.Handle._run = counting  # type: ignore[method-assign]
        try:
            yield
        finally:
            events.Handle._run = run  # type: ignore[method-assign]

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._count += 1
        # Enough is known by then, and the test must end.
        return self._trace if self._count < 10 * MOST_BYTECODES else None


def _is_of_a_call(handle: Any) -> bool:
    task = getattr(handle._callback, "__self__", None)
    if isinstance(task, asyncio.Task) and task.get_name().startswith("HandleExceptions"):
        return True
    return bool(handle._context.get(logs.request_id, ""))


def long_fields(descriptor: Any, above: Path = ()) -> Iterator[Path]:
    """Yields the way to every field that may be long: lists, maps, texts, bytes."""
    for field in descriptor.fields:
        is_message = field.type == FieldDescriptor.TYPE_MESSAGE
        is_text = field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
        if field.is_repeated or is_text:
            yield (*above, field)
        if is_message and len(above) < _MAX_DEPTH and not _is_map(field):
            yield from long_fields(field.message_type, (*above, field))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def largest(path: str, method: Any) -> Iterator[tuple[str, bytes]]:
    """Yields the largest messages of a method, one for each long field, and which it is."""
    max_elements, max_bytes = message_io.SMALL_ELEMENTS, message_io.SMALL_BYTES
    if path in message_io._BRING_FILES:
        max_elements, max_bytes = message_io.MAX_ELEMENTS, MAX_MESSAGE_MB * 2**20
    if "Health" in path:
        max_bytes = message_io.HEALTH_BYTES
    kind = message_factory.GetMessageClass(method.input_type)
    for fields in long_fields(method.input_type):
        for is_filled in (False, True):

            def made(length: int, fields: Path = fields, is_filled: bool = is_filled) -> Message:
                message = kind()
                if (base := BASES.get(method.input_type.name)) is not None:
                    message.CopyFrom(base)
                _extend(_holder(message, fields[:-1]), fields[-1], length, is_filled=is_filled)
                return message

            size_one, size_two = (made(n).ByteSize() for n in (200, 400))
            elements_one, elements_two = (_elements(made(n)) for n in (200, 400))
            bytes_each = max((size_two - size_one) / 200, 0.01)
            elements_each = max((elements_two - elements_one) / 200, 0.0001)
            length = int(
                min((max_bytes - _ROOM_BYTES) / bytes_each, (max_elements - 50) / elements_each)
            )
            message = made(length)
            assert _elements(message) <= max_elements
            assert message.ByteSize() <= max_bytes
            yield ".".join(field.name for field in fields), message.SerializeToString()
            if not (fields[-1].is_repeated and fields[-1].message_type is not None):
                break


def _elements(message: Message) -> int:
    counted = message_io.count(message.SerializeToString(), message.DESCRIPTOR, 10**9)
    assert counted is not None
    return counted


def _holder(message: Any, fields: Path) -> Any:
    """Returns the message that holds the last field, made with all that lies on the way."""
    for field in fields:
        inner = getattr(message, field.name)
        if field.is_repeated:
            inner = inner[0] if len(inner) else inner.add()
        else:
            inner.SetInParent()
        message = inner
    return message


def _extend(message: Any, field: FieldDescriptor, length: int, *, is_filled: bool) -> None:
    value = getattr(message, field.name)
    if not field.is_repeated:
        text: Any = b"x" * length if field.type == FieldDescriptor.TYPE_BYTES else "x" * length
        setattr(message, field.name, text)
    elif _is_map(field):
        key, held = field.message_type.fields
        for number in range(length):
            name = number if key.type != FieldDescriptor.TYPE_STRING else f"{number:05x}"
            if held.message_type is not None:
                value[name].SetInParent()
            else:
                value[name] = held.default_value
    elif field.message_type is not None:
        entry = value.add()
        if is_filled:
            _set_first(entry)
        value.extend([entry] * (length - 1))
    elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        value.extend([b"x" if field.type == FieldDescriptor.TYPE_BYTES else "x"] * length)
    elif field.enum_type is not None:
        value.extend([field.enum_type.values[-1].number] * length)
    else:
        value.extend([1] * length)


def _set_first(message: Any) -> None:
    """Gives the first scalar field a value, so that whoever walks the list walks on."""
    for field in message.DESCRIPTOR.fields:
        if not field.is_repeated and field.message_type is None:
            is_text = field.type == FieldDescriptor.TYPE_STRING
            is_bytes = field.type == FieldDescriptor.TYPE_BYTES
            setattr(message, field.name, "x" if is_text else b"x" if is_bytes else 1)
            return


def sent(path: str, raw: bytes) -> list[bytes]:
    """Returns the messages of a call that brings this one, where it belongs."""
    message = message_factory.GetMessageClass(PATHS[path].input_type).FromString(raw)
    if path.endswith("/UploadDataset"):
        return upload_around(message)
    if path.endswith("/RegisterBackbone") and message.WhichOneof("part") == "chunk":
        description = backbone_pb2.BackboneDescription(name="onnx/b", size=8, sha256="0" * 64)
        first = backbone_pb2.RegisterBackboneRequest(description=description)
        return [first.SerializeToString(), raw]
    return [raw]


async def ask(service: Service, path: str, requests: list[bytes]) -> None:
    """Makes a call, and takes its one answer, the first of many, or its refusal."""
    method = PATHS[path]

    async def stream() -> AsyncIterator[bytes]:
        for request in requests:
            yield request

    shape = "stream" if method.client_streaming else "unary"
    shape += "_stream" if method.server_streaming else "_unary"
    given = stream() if method.client_streaming else requests[0]
    call = getattr(service.channel, shape)(path)(given, timeout=GUARD_S)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except aio.AioRpcError:
        pass
    assert await call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """Serves all tests: none of the requests changes what another one asks for."""
    async with services(tmp_path_factory.mktemp("largest")) as make:
        made: Service = await make(max_message_mb=MAX_MESSAGE_MB)
        await made.make_model()
        yield made
        answer = await made.models.GetModel(model_pb2.GetModelRequest(model="colours"))
        assert answer.model.version_count == 1


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
async def test_the_largest_requests_of_a_method_are_no_work_of_the_event_loop(
    service: Service, path: str
) -> None:
    method = PATHS[path]
    found = {}
    # The first call pays for what is imported and cached.
    await ask(service, path, sent(path, b""))
    for name, raw in [("nothing", b""), *largest(path, method)]:
        turns = Turns()
        with turns.counted():
            await ask(service, path, sent(path, raw))
        found[name] = turns.worst
    assert min(found.values()) > 0
    assert {name: count for name, count in found.items() if count > MOST_BYTECODES} == {}


async def test_work_on_the_event_loop_is_seen() -> None:
    turns = Turns()

    async def walk(length: int) -> None:
        logs.request_id.set("call")
        await asyncio.sleep(0)
        for _ in range(length):
            pass

    with turns.counted():
        await asyncio.create_task(walk(1000))
        few = turns.worst
        await asyncio.create_task(walk(MOST_BYTECODES))
    assert 1000 < few < 10_000
    assert turns.worst > MOST_BYTECODES
