"""What a server answered, reduced to what a caller can rely on: what is filled, and how it is."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from graftml import AsyncClient, GraftError

TOLD = frozenset({"state", "kind", "version", "source", "verdict", "method", "is_candidate"})
"""Fields whose values are compared, not only whether they are filled."""
FREE = frozenset({"graft.v1.Job.progress"})
"""Fields that are filled or not as it happens."""
PASSING = frozenset({"progress", "message"})
"""Events of which a job has as many as it takes, where it comes to them."""


def shape(message: Message, above: str = "") -> list[str]:
    """Returns the paths of a message's filled fields; of a list, those of any of its elements."""
    found = set()
    for field, value in message.ListFields():
        path = f"{above}{field.name}"
        if field.full_name in FREE:
            continue
        if field.message_type is None:
            found.add(f"{path}={_named(field, value)}" if field.name in TOLD else path)
        elif field.message_type.GetOptions().map_entry:
            found |= {f"{path}[{key}]" for key in value}
        elif not field.message_type.full_name.startswith("graft."):
            # A time, a duration, the status of an error.
            found.add(path)
        else:
            parts = value if field.is_repeated else [value]
            found |= {path, *(line for part in parts for line in shape(part, f"{path}."))}
    return sorted(found)


def _named(field: Any, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_ENUM:
        return field.enum_type.values_by_number[value].name
    return value


STREAMED = frozenset({"WatchJobResponse", "ExportModelResponse"})


class Transcript:
    """The answers to one client's calls, and the errors that it was refused with."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, list[str]]] = []

    def answer(self, answer: Any) -> None:
        """Notes an answer; what comes as often as it does, once."""
        kind, noted = answer.DESCRIPTOR.name, shape(answer)
        if kind == "WatchJobResponse" and answer.event.WhichOneof("payload") in PASSING:
            return
        if kind not in STREAMED or not self.lines or self.lines[-1] != (kind, noted):
            self.lines.append((kind, noted))

    @contextmanager
    def refusal(self) -> Iterator[None]:
        """Notes the error of a call that must be refused."""
        try:
            yield
        except GraftError as error:
            fields = [violation.field for violation in error.violations]
            self.lines.append((type(error).__name__, [error.code.name, error.reason, *fields]))
        else:
            raise AssertionError("it was not refused")


def differences(real: Transcript, fake: Transcript) -> str:
    """Returns what differs as a diff, "" where nothing does."""
    texts = [
        [line for kind, noted in told.lines for line in (kind, *(f"  {row}" for row in noted))]
        for told in (real, fake)
    ]
    return "\n".join(difflib.unified_diff(*texts, "real", "fake", n=3, lineterm=""))


def listen(client: AsyncClient) -> Transcript:
    """Notes every answer that a client gets, as it came over the wire."""
    transcript, transport = Transcript(), client._transport

    def noting(carry: Callable[..., Any]) -> Callable[..., Any]:
        async def noted(*args: Any, **kwargs: Any) -> Any:
            answer = await carry(*args, **kwargs)
            transcript.answer(answer)
            return answer

        return noted

    def noting_all(carry: Callable[..., Any]) -> Callable[..., Any]:
        async def noted(*args: Any, **kwargs: Any) -> Any:
            async for answer in carry(*args, **kwargs):
                transcript.answer(answer)
                yield answer

        return noted

    for name in ("unary", "collect"):
        setattr(transport, name, noting(getattr(transport, name)))
    for name in ("answers", "exchange"):
        setattr(transport, name, noting_all(getattr(transport, name)))
    return transcript
