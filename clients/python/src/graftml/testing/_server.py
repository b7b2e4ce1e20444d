"""The fake server: what was called, what is answered instead, and what shall fail."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from graftml_stubs.v1.fine_tuning_pb2 import JobEvent

from graftml import _rpcs
from graftml.errors import DETAILS_KEY, GraftError
from graftml.testing._jobs import Jobs
from graftml.testing._prediction import Predict, Predictions
from graftml.testing._records import Records
from graftml.testing._refusals import code_of, to_status
from graftml.testing._script import CLASSES, DEFAULT_SCRIPT, RANKING_SCRIPT

_THREADS = 16
_STOP_TIMEOUT_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 2**20

Given = Message | Iterable[Message] | Callable[[Any], Any]
"""An answer, the answers of a stream, or a function that returns them for a request."""


@dataclass(frozen=True)
class Recorded:
    """One call that arrived."""

    method: str
    """Its name alone: "GetModel"."""
    request: Any
    """The message; where the client streams, a list of those that have arrived."""
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Failure:
    error: GraftError | None
    after: int
    delay_s: float


class FakeGraft:
    """A Graft server with nothing behind it.

    `predict` answers images; `script` is what each fine-tuning plays at once when it
    is started, `ranking_script` what a ranking does. Give an empty one and let events happen
    with `play`.
    """

    def __init__(
        self,
        *,
        predict: Predict | None = None,
        script: Iterable[JobEvent] = DEFAULT_SCRIPT,
        ranking_script: Iterable[JobEvent] = RANKING_SCRIPT,
    ) -> None:
        self._lock = threading.Condition()
        self._records = Records()
        self._jobs = Jobs(self._records, self._lock, script, ranking_script)
        self._predictions = Predictions(self._records, self._lock, predict)
        self._recorded: list[Recorded] = []
        self._given: dict[str, Given] = {}
        self._failures: dict[str, deque[_Failure]] = defaultdict(deque)
        self._stopped = threading.Event()
        self._server: grpc.Server | None = None
        self._port = 0
        self.is_serving = True
        """What health checks are told."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """The address for the client."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens; after a `stop` on the same port, with everything that was there."""
        server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="fake-graft"),
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        services: dict[str, dict[str, Any]] = defaultdict(dict)
        for method in _rpcs.METHODS.values():
            services[method.containing_service.full_name][method.name] = self._handler(method)
        name, _, check = _rpcs.HEALTH_CHECK.strip("/").partition("/")
        services[name][check] = grpc.unary_unary_rpc_method_handler(self._health)
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(service, handlers)
                for service, handlers in services.items()
            )
        )
        self._stopped.clear()
        self._jobs.is_stopped = False
        self._port = server.add_insecure_port(self.target)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Breaks every connection; what is stored stays, for another `start`."""
        if self._server is not None:
            ended = self._server.stop(grace=None)
            self._stopped.set()
            with self._lock:
                self._jobs.is_stopped = True
                self._lock.notify_all()
            ended.wait(_STOP_TIMEOUT_S)
            self._server = None

    def add_model(self, name: str, classes: Sequence[str] = CLASSES, *, versions: int = 1) -> None:
        """Publishes a model, or more versions of it."""
        with self._lock:
            for _ in range(versions):
                self._records.publish(name, classes)

    def play(self, job_id: str, *events: JobEvent) -> None:
        """Lets events happen to a job."""
        self._jobs.play(job_id, events)

    def answer(self, method: str, given: Given) -> None:
        """Says what a method ("GetVersion") answers from now on, whatever it is asked.

        `given` is a message of the contract, several for a streamed answer, or a function that
        returns them for a request, or for the messages of a streamed one.
        """
        with self._lock:
            self._given[method] = given

    def fail(
        self,
        method: str,
        error: GraftError | None,
        *,
        times: int = 1,
        after: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        """Makes the next calls of a method fail; a streamed answer after `after` messages.

        With `delay_s` they take so long before; without an error they are answered after it.
        An error without a reason travels without details, as a broken connection's would.
        """
        with self._lock:
            self._failures[method].extend([_Failure(error, after, delay_s)] * times)

    @property
    def calls(self) -> list[Recorded]:
        """Every call that arrived, health checks aside, in order."""
        with self._lock:
            return list(self._recorded)

    def requests(self, method: str) -> list[Any]:
        """The requests of one method, in order; each a list of messages where it streams them."""
        return [call.request for call in self.calls if call.method == method]

    def _health(self, _request: bytes, _context: Any) -> bytes:
        return _rpcs.SERVING if self.is_serving else _rpcs.NOT_SERVING

    def _handler(self, method: MethodDescriptor) -> Any:
        """Makes gRPC's handler of a method, as its descriptor says."""
        asks, answers = method.client_streaming, method.server_streaming
        make: Any = getattr(
            grpc,
            f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}"
            "_rpc_method_handler",
        )

        def one(sent: Any, context: Any) -> Any:
            for answer in self._answered(method, sent, context):
                return answer
            return None

        def many(sent: Any, context: Any) -> Iterator[Any]:
            yield from self._answered(method, sent, context)

        return make(
            many if answers else one,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _answered(self, method: MethodDescriptor, sent: Any, context: Any) -> Iterator[Message]:
        """Notes a call, fails it where told to, and yields its answers."""
        arrived: list[Message] = []
        noted = arrived if method.client_streaming else sent
        with self._lock:
            metadata = dict(context.invocation_metadata())
            self._recorded.append(Recorded(method.name, noted, metadata))
            failures = self._failures[method.name]
            failure = failures.popleft() if failures else _Failure(None, 0, 0.0)
        self._stopped.wait(failure.delay_s)
        streamed = _noted(sent, arrived) if method.client_streaming else None
        try:
            if failure.error is not None and not method.server_streaming:
                raise failure.error
            asked = sent if streamed is None else streamed
            for count, answer in enumerate(self._answers(method, asked, context)):
                if failure.error is not None and count == failure.after:
                    raise failure.error
                yield answer
            if failure.error is not None:
                raise failure.error
        except GraftError as error:
            status = to_status(error)
            if status.details:
                context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
            context.abort(code_of(error), error.message)

    def _answers(self, method: MethodDescriptor, sent: Any, context: Any) -> Iterator[Message]:
        """Yields what a test gave, else what the fake has; else an empty message."""
        given = self._given.get(method.name)
        if method.client_streaming and (given is not None or not method.server_streaming):
            sent = list(sent)
        if given is not None:
            found = given(sent) if callable(given) else given
        elif method.name == "WatchJob":
            found = self._jobs.WatchJob(sent, context)
        elif hasattr(self._predictions, method.name):
            found = getattr(self._predictions, method.name)(sent)
        else:
            with self._lock:
                found = self._kept(method)(sent)
        if isinstance(found, Message):
            yield found
        else:
            yield from found

    def _kept(self, method: MethodDescriptor) -> Callable[[Any], Any]:
        for place in (self._jobs, self._records):
            if hasattr(place, method.name):
                found: Callable[[Any], Any] = getattr(place, method.name)
                return found
        return lambda _: GetMessageClass(method.output_type)()


def _noted(messages: Iterator[Message], arrived: list[Message]) -> Iterator[Message]:
    for message in messages:
        arrived.append(message)
        yield message
