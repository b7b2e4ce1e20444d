"""The blocking client.

Thin: what is sent and how answers are read is `_calls`', how calls are carried
out is `_sync`'s. May be shared by threads. Ends with `close` or its `with`.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from graftml_stubs.v1 import prediction_pb2

from graftml import _answers, _backbones, _calls, _channel, _requests, _rpcs, _uploads
from graftml._backbones import Layout
from graftml._channel import NOT_SERVING, PROBE_TIMEOUT_S, TRANSFER_TIMEOUT_S, ranking_timeout_s
from graftml._datasets import DatasetMethods
from graftml._export import whole_file
from graftml._images import ImageLike, model_spec, model_specs, predict_requests
from graftml._jobs import JobHandle, RankingHandle
from graftml._order import IMAGES_A_REQUEST, REQUESTS_UNDER_WAY, Order
from graftml._sync import Transport
from graftml._uploads import Data, OnProgress, Upload
from graftml._watch import Watch
from graftml.errors import DeadlineExceeded, GraftError, Unavailable
from graftml.retry import RetryPolicy
from graftml.types import (
    Backbone,
    BackboneRanking,
    Decision,
    FineTuneOptions,
    Job,
    JobEvent,
    Model,
    ModelSpec,
    Prediction,
    PretrainedBackbone,
    RankOptions,
    Rollback,
    Version,
)


class Client(DatasetMethods):
    """A connection to a Graft server.

    `timeout_s` is the deadline of each call, its repeats included; uploads and
    exports have an hour instead. `token` travels as a bearer token;
    `credentials` switch TLS on. A `channel` of your own is used as it is and
    left open.
    """

    def __init__(
        self,
        target: str = _channel.DEFAULT_TARGET,
        *,
        timeout_s: float = _channel.DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        max_message_bytes: int = _channel.MAX_MESSAGE_BYTES,
        channel: grpc.Channel | None = None,
    ) -> None:
        settings = _channel.settings(target, credentials, token, metadata, max_message_bytes)
        self._transport = Transport(settings, retry or RetryPolicy(), timeout_s, channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._transport.close()

    def with_timeout(self, timeout_s: float) -> "Client":
        """The same connection with another deadline for its calls."""
        other = object.__new__(type(self))
        other._transport = self._transport.with_timeout(timeout_s)
        return other

    # Fine-tuning

    def fine_tune(
        self,
        data: Data,
        name: str,
        *,
        on_upload: OnProgress | None = None,
        **options: Unpack[FineTuneOptions],
    ) -> JobHandle:
        """Starts a job that makes a version of the model `name`; uploads `data` where needed.

        `data` is a folder with a folder per class, an archive of one, pairs of a
        label and an image, a `Dataset` or its id, or a `ServerPath`. The options
        are `FineTuneOptions`. The target of a domain adaptation is uploaded too.
        """
        # Bad options are found before anything is uploaded: first what the client can check,
        # then, below, what the server can.
        chosen = _requests.identified(options)
        _calls.fine_tune("", name, chosen)
        method = _requests.method(chosen)
        source = _uploads.stored(
            data,
            on_upload,
            case_sensitive_labels=options.get("case_sensitive_labels", False),
        )
        target = _uploads.stored_target(method, on_upload)
        if isinstance(source, Upload) or isinstance(target, Upload):
            there = _uploads.there(source), _uploads.there(target)
            self._transport.unary(_calls.check_fine_tune(there[0], name, chosen, there[1]))
        call = _calls.fine_tune(self._sent(source), name, chosen, self._sent(target))
        return JobHandle(self, self._transport.unary(call))

    def job(self, job_id: str) -> JobHandle:
        """A handle on a job that was started before."""
        return JobHandle(self, self.get_job(job_id))

    def get_job(self, job_id: str) -> Job:
        """Describes one job."""
        return self._transport.unary(_calls.get_job(job_id))

    def list_jobs(self, *, states: Iterable[str] | str = (), model: str = "") -> Iterator[Job]:
        """Jobs, newest first; only those in one of `states` and of `model`, where given."""
        return self._transport.pages(lambda token: _calls.list_jobs(states, model, token))

    def watch_job(
        self, job_id: str, *, after: int = 0, timeout_s: float | None = None
    ) -> Iterator[JobEvent]:
        """The job's events after the one numbered `after`, to its last; survives lost connections.

        Without `timeout_s` it watches as long as the job lives.
        """
        return self._transport.watch(Watch(job_id, after, timeout_s, self._transport.policy))

    def cancel_job(self, job_id: str) -> Job:
        """Asks for a job's end; a running one ends soon after."""
        return self._transport.unary(_calls.cancel_job(job_id))

    def delete_job(self, job_id: str) -> None:
        """Deletes a job that has ended, with its events; its version stays."""
        self._transport.unary(_calls.delete_job(job_id))

    def start_ranking(
        self,
        data: Data,
        *,
        backbones: Iterable[str | PretrainedBackbone] = (),
        time_budget_s: float | None = None,
        seed: int | None = None,
        case_sensitive_labels: bool = False,
        request_id: str = "",
        on_upload: OnProgress | None = None,
    ) -> RankingHandle:
        """Starts a job that says which backbone to start from; `data` is as in `fine_tune`.

        Backbones are names, "NAME:WEIGHTS", or `PretrainedBackbone`s;
        none means all whose weights the server has.
        """
        given = _requests.listed(backbones)
        # Bad options are found out before anything is uploaded.
        _calls.rank_backbones("", given, time_budget_s, seed)
        source = _uploads.stored(data, on_upload, case_sensitive_labels=case_sensitive_labels)
        if isinstance(source, Upload):
            self._transport.unary(_calls.check_rank_backbones(given, time_budget_s, seed))
        call = _calls.rank_backbones(
            self._sent(source),
            given,
            time_budget_s,
            seed,
            case_sensitive_labels=case_sensitive_labels,
            request_id=request_id,
        )
        return RankingHandle(self, self._transport.unary(call))

    def rank_backbones(
        self,
        data: Data,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RankOptions],
    ) -> BackboneRanking:
        """Says which backbone to start from, as `start_ranking`, and waits for the answer.

        Waits two minutes longer than the time budget (60 s where none is given), or `timeout_s`;
        cancels the job when it takes longer, or the caller is interrupted.
        """
        started = self.start_ranking(data, **options)
        return started.result(timeout_s or ranking_timeout_s(options.get("time_budget_s")))

    # Backbones

    def register_backbone(
        self,
        path: str | PathLike[str],
        name: str,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layout: Layout = "nchw",
        output: str = "",
        licence: str = "",
        sha256: str = "",
        on_progress: OnProgress | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Backbone:
        """Registers an ONNX file as a backbone; it is used as `backbone="onnx/NAME"`.

        It takes float32 images of `size` pixels a side, of which `mean` was subtracted and
        which were divided by `std`, of red, green and blue from 0 to 1. `output` names the
        value that the features are, any of the graph's; "" means its one output. Needs the
        role admin. Raises InvalidArgument (BACKBONE_UNUSABLE) with what is wrong with it.
        """
        described = _backbones.described(name, size, mean, std, layout, output, licence, sha256)
        given = _backbones.registration(path, described, on_progress)

        def send(left_s: float) -> Backbone:
            answer = self._transport.collect(_rpcs.REGISTER_BACKBONE, given.messages(), left_s)
            return _answers.backbone(answer.backbone)

        return self._transport.attempts(send, timeout_s, is_safe=_rpcs.REGISTER_BACKBONE.is_safe)

    def list_backbones(self) -> Iterator[Backbone]:
        """Backbones that jobs can start from without a download, registered ones too, by name."""
        return self._transport.pages(_calls.list_backbones)

    def delete_backbone(self, name: str) -> None:
        """Deletes a registered backbone that no version and no open job is on."""
        self._transport.unary(_calls.delete_backbone(name))

    # Prediction

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        model: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 1,
        include_features: bool = False,
        decision: Decision | None = None,
        timeout_s: float | None = None,
    ) -> list[Prediction]:
        """Classifies one image or many; one `Prediction` for each, in their order.

        What is too much for one call is sent in several, and `timeout_s` is for
        each. An image that the service cannot read has its error in its
        `Prediction`. `decision` says how probabilities become an answer, instead of the
        version's own.
        """
        (predictions,) = self.predict_many(
            images,
            [ModelSpec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            timeout_s=timeout_s,
        )
        return predictions

    def predict_many(
        self,
        images: ImageLike | Iterable[ImageLike],
        models: Iterable[str | ModelSpec],
        *,
        top_k: int = 1,
        include_features: bool = False,
        timeout_s: float | None = None,
    ) -> list[list[Prediction]]:
        """Classifies images with several models at once; a list for each model, as `predict`'s.

        Names mean newest versions, a `ModelSpec` any other. The service decodes an image once
        for all of them, and runs it once through each backbone that they are on: several models
        on one backbone cost about what one does.
        """
        specs = model_specs(models)
        requests = predict_requests(images, specs, top_k=top_k, include_features=include_features)
        found: list[list[Prediction]] = [[] for _ in specs]
        for request in requests:
            answers = self._transport.unary(_calls.predict(request), timeout_s)
            for of_one, more in zip(found, answers, strict=True):
                of_one.extend(more)
        return found

    def predict_stream(
        self,
        images: Iterable[ImageLike],
        model: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 1,
        include_features: bool = False,
        decision: Decision | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Iterator[Prediction]:
        """Classifies any number of images over one stream, reading them as answers come.

        At most a few hundred images are under way. Predictions come in the
        images' order; where a whole request failed, each of its images has
        its error.
        """
        requests = predict_requests(
            images,
            [model_spec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            max_images=IMAGES_A_REQUEST,
        )
        order, room, left = Order(), threading.Semaphore(REQUESTS_UNDER_WAY), threading.Event()

        def messages() -> Iterator[prediction_pb2.PredictStreamRequest]:
            for request in requests:
                # Ends with the stream: `left` is set, and `room` made, on every way out.
                room.acquire()
                if left.is_set():
                    return
                yield order.to_send(request)

        answers = self._transport.exchange(_rpcs.PREDICT_STREAM, messages(), timeout_s)
        try:
            for answer in answers:
                for predictions in order.take(answer):
                    room.release()
                    yield from predictions
        finally:
            left.set()
            room.release()
            answers.close()
        if not order.is_complete:
            raise Unavailable(f"{self._transport.target} ended the stream before its last answer")

    # Models

    def get_model(self, model: str) -> Model:
        """Describes one model."""
        return self._transport.unary(_calls.get_model(model))

    def list_models(self) -> Iterator[Model]:
        """Models by name."""
        return self._transport.pages(_calls.list_models)

    def delete_model(self, model: str, *, force: bool = False) -> None:
        """Deletes a model with all its versions and aliases; there is no way back.

        A model that aliases other than `latest` name is deleted with `force` alone; without
        it FailedPrecondition (MODEL_IN_USE) is raised.
        """
        self._transport.unary(_calls.delete_model(model, force))

    def get_version(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> Version:
        """Describes one version; the newest where neither `version` nor `alias` is given."""
        return self._transport.unary(_calls.get_version(model, version, alias))

    def list_versions(self, model: str) -> Iterator[Version]:
        """A model's versions, newest first."""
        return self._transport.pages(lambda token: _calls.list_versions(model, token))

    def delete_version(self, model: str, version: int) -> None:
        """Deletes a version; the last one goes only with its model."""
        self._transport.unary(_calls.delete_version(model, version))

    def set_alias(self, model: str, alias: str, version: int) -> Model:
        """Points an alias to a version; makes the alias if it is new."""
        return self._transport.unary(_calls.set_alias(model, alias, version))

    def delete_alias(self, model: str, alias: str) -> Model:
        """Removes an alias."""
        return self._transport.unary(_calls.delete_alias(model, alias))

    def rollback_alias(self, model: str, alias: str = "latest") -> Rollback:
        """Points an alias back to the version before; again, to the one before that."""
        return self._transport.unary(_calls.rollback_alias(model, alias))

    def promote_version(self, model: str, version: int) -> Model:
        """Publishes a candidate although it did not pass its gate; `latest` moves to it."""
        return self._transport.unary(_calls.promote_version(model, version))

    def get_report(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> dict[str, Any]:
        """The report that training wrote, for programs."""
        return self._transport.unary(_calls.get_report(model, version, alias))

    def get_report_html(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> str:
        """The report as one page for people."""
        return self._transport.unary(_calls.get_report_html(model, version, alias))

    def export_model(
        self,
        model: str,
        path: str | PathLike[str],
        *,
        version: int | None = None,
        alias: str | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Path:
        """Writes one self-contained .onnx file, whole or not at all; returns its path."""
        request, to = _calls.export_request(model, version, alias), Path(path)

        def write(left_s: float) -> Path:
            answers = self._transport.answers(_rpcs.EXPORT_MODEL, request, left_s)
            with closing(answers), whole_file(to) as file:
                for answer in answers:
                    file.write(answer.chunk)
            return to

        return self._transport.attempts(write, timeout_s, is_safe=_rpcs.EXPORT_MODEL.is_safe)

    # Health

    def is_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
        """Tells whether the server answers and says that it serves."""
        return self.why_not_serving(timeout_s) is None

    def why_not_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        """Says why the server does not serve: what is wrong with the connection, or with it.

        Returns None where it answers and says that it serves.
        """
        try:
            is_serving = self._transport.probe(timeout_s, wait=False)
        except GraftError as error:
            return self._transport.explained(error).message
        return None if is_serving else f"{self._transport.target} {NOT_SERVING}"

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Returns when the server serves; raises DeadlineExceeded when it does not in time."""
        patience = _channel.Patience(self._transport.target, timeout_s)
        while True:
            try:
                if self._transport.probe(patience.probe_s, wait=True):
                    return
                patience.error = None
            except (Unavailable, DeadlineExceeded) as error:
                patience.error = error
            if patience.is_over:
                last = patience.error
                why = "" if last is None else self._transport.explained(last).message
                raise patience.gave_up(why)
            time.sleep(_channel.PROBE_PAUSE_S)
