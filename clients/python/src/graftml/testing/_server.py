"""The fake server: services, health, what was called, and what shall fail."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from graftml_stubs.v1 import (
    backbone_pb2_grpc,
    dataset_pb2_grpc,
    fine_tuning_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
)
from graftml_stubs.v1.fine_tuning_pb2 import JobEvent

from graftml.errors import DETAILS_KEY, GraftError
from graftml.testing._backbones import Backbones
from graftml.testing._datasets import Datasets
from graftml.testing._jobs import Jobs
from graftml.testing._models import Models
from graftml.testing._prediction import Predict, Predictions
from graftml.testing._refusals import code_of, to_status
from graftml.testing._script import DEFAULT_SCRIPT, RANKING_SCRIPT

_THREADS = 16
_STOP_TIMEOUT_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Recorded:
    """One call that arrived."""

    method: str
    """Its name alone: "GetModel"."""
    request: Any
    """The message; None where the client streams."""
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Failure:
    error: GraftError
    after: int


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
        self._models = Models()
        self._datasets = Datasets()
        self._backbones = Backbones()
        self._jobs = Jobs(self._models, self._datasets, script, ranking_script)
        self._predictions = Predictions(self._models, predict)
        self._calls = _Calls()
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
            interceptors=[self._calls],
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server(self._jobs, server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(self._datasets, server)
        backbone_pb2_grpc.add_BackboneServiceServicer_to_server(self._backbones, server)
        prediction_pb2_grpc.add_PredictionServiceServicer_to_server(self._predictions, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self._models, server)
        health: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(self._health)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),)
        )
        self._jobs.start()
        self._port = server.add_insecure_port(self.target)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Breaks every connection; what is stored stays, for another `start`."""
        if self._server is not None:
            ended = self._server.stop(grace=None)
            self._jobs.stop()
            ended.wait(_STOP_TIMEOUT_S)
            self._server = None

    def add_model(
        self, name: str, classes: Sequence[str] = ("cat", "dog"), *, versions: int = 1
    ) -> None:
        """Publishes a model, or more versions of it."""
        for _ in range(versions):
            self._models.publish(name, classes)

    def play(self, job_id: str, *events: JobEvent) -> None:
        """Lets events happen to a job."""
        self._jobs.play(job_id, events)

    def images(self, dataset_id: str) -> list[tuple[str, str, bytes]]:
        """What was uploaded, in its order: split ("", "train", "val"), class, bytes."""
        return self._datasets.images(dataset_id)

    def backbone_file(self, name: str) -> bytes:
        """What was registered as a backbone, by its name, "onnx/NAME"."""
        return self._backbones.files[name]

    def fail(self, method: str, error: GraftError, *, times: int = 1, after: int = 0) -> None:
        """The next calls of a method ("WatchJob") fail; a streamed answer after `after` messages.

        An error without a reason travels without details, as a broken
        connection's would.
        """
        self._calls.fail(method, [_Failure(error, after)] * times)

    @property
    def calls(self) -> list[Recorded]:
        """Every call that arrived, health checks aside, in order."""
        return self._calls.recorded()

    def requests(self, method: str) -> list[Any]:
        """The requests of one method, in order."""
        return [call.request for call in self.calls if call.method == method]

    def _health(self, _request: bytes, _context: Any) -> bytes:
        return b"\x08\x01" if self.is_serving else b"\x08\x02"


class _Calls(grpc.ServerInterceptor):
    """Around every handler: notes the call, fails it where told to, turns errors to statuses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorded: list[Recorded] = []
        self._failures: dict[str, deque[_Failure]] = defaultdict(deque)

    def fail(self, method: str, failures: list[_Failure]) -> None:
        with self._lock:
            self._failures[method].extend(failures)

    def recorded(self) -> list[Recorded]:
        with self._lock:
            return list(self._recorded)

    def _arrived(self, method: str, request: Any, context: Any) -> _Failure | None:
        metadata = dict(context.invocation_metadata())
        with self._lock:
            self._recorded.append(Recorded(method, request, metadata))
            failures = self._failures[method]
            return failures.popleft() if failures else None

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        service, _, method = str(details.method).rpartition("/")
        if handler is None or not service.startswith("/graft."):
            return handler
        streams = handler.request_streaming

        def one(request: Any, context: Any) -> Any:
            failure = self._arrived(method, None if streams else request, context)
            try:
                if failure is not None:
                    raise failure.error
                return (handler.stream_unary if streams else handler.unary_unary)(request, context)
            except GraftError as error:
                _abort(context, error)

        def many(request: Any, context: Any) -> Iterator[Any]:
            failure = self._arrived(method, None if streams else request, context)
            answers = (handler.stream_stream if streams else handler.unary_stream)(request, context)
            try:
                for sent, answer in enumerate(answers):
                    if failure is not None and sent == failure.after:
                        raise failure.error
                    yield answer
                if failure is not None:
                    raise failure.error
            except GraftError as error:
                _abort(context, error)

        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if streams
                else grpc.unary_stream_rpc_method_handler
            )
            return make(many, handler.request_deserializer, handler.response_serializer)
        make_one = (
            grpc.stream_unary_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        return make_one(one, handler.request_deserializer, handler.response_serializer)


def _abort(context: Any, error: GraftError) -> None:
    status = to_status(error)
    if status.details:
        context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code_of(error), error.message)
