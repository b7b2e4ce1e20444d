"""The asyncio client: `Client` with `await`, the same methods and arguments.

Make it inside a coroutine: it belongs to the event loop that it was made in.
Ends with `close` or its `async with`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from graftml_stubs.v1 import prediction_pb2
from grpc import aio

from graftml import _answers, _backbones, _calls, _channel, _requests, _rpcs, _uploads
from graftml._async import AsyncTransport, stepwise
from graftml._backbones import Layout
from graftml._channel import NOT_SERVING, PROBE_TIMEOUT_S, TRANSFER_TIMEOUT_S, ranking_timeout_s
from graftml._datasets import AsyncDatasetMethods
from graftml._export import whole_file
from graftml._images import ImageLike, model_spec, model_specs, predict_requests
from graftml._jobs import AsyncJobHandle, AsyncRankingHandle
from graftml._order import IMAGES_A_REQUEST, REQUESTS_UNDER_WAY, Order
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


class AsyncClient(AsyncDatasetMethods):
    """A connection to a Graft server; see `Client`."""

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
        channel: aio.Channel | None = None,
    ) -> None:
        settings = _channel.settings(target, credentials, token, metadata, max_message_bytes)
        self._transport = AsyncTransport(settings, retry or RetryPolicy(), timeout_s, channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        await self._transport.close()

    def with_timeout(self, timeout_s: float) -> "AsyncClient":
        """As `Client.with_timeout`."""
        other = object.__new__(type(self))
        other._transport = self._transport.with_timeout(timeout_s)
        return other

    # Fine-tuning

    async def fine_tune(
        self,
        data: Data,
        name: str,
        *,
        on_upload: OnProgress | None = None,
        **options: Unpack[FineTuneOptions],
    ) -> AsyncJobHandle:
        """As `Client.fine_tune`."""
        chosen = _requests.identified(options)
        _calls.fine_tune("", name, chosen)
        method = _requests.method(chosen)
        source = await asyncio.to_thread(
            _uploads.stored,
            data,
            on_upload,
            case_sensitive_labels=options.get("case_sensitive_labels", False),
        )
        target = await asyncio.to_thread(_uploads.stored_target, method, on_upload)
        if isinstance(source, Upload) or isinstance(target, Upload):
            there = _uploads.there(source), _uploads.there(target)
            await self._transport.unary(_calls.check_fine_tune(there[0], name, chosen, there[1]))
        call = _calls.fine_tune(await self._sent(source), name, chosen, await self._sent(target))
        return AsyncJobHandle(self, await self._transport.unary(call))

    async def job(self, job_id: str) -> AsyncJobHandle:
        """As `Client.job`."""
        return AsyncJobHandle(self, await self.get_job(job_id))

    async def get_job(self, job_id: str) -> Job:
        """As `Client.get_job`."""
        return await self._transport.unary(_calls.get_job(job_id))

    def list_jobs(self, *, states: Iterable[str] | str = (), model: str = "") -> AsyncIterator[Job]:
        """As `Client.list_jobs`."""
        return self._transport.pages(lambda token: _calls.list_jobs(states, model, token))

    def watch_job(
        self, job_id: str, *, after: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[JobEvent]:
        """As `Client.watch_job`."""
        return self._transport.watch(Watch(job_id, after, timeout_s, self._transport.policy))

    async def cancel_job(self, job_id: str) -> Job:
        """As `Client.cancel_job`."""
        return await self._transport.unary(_calls.cancel_job(job_id))

    async def delete_job(self, job_id: str) -> None:
        """As `Client.delete_job`."""
        await self._transport.unary(_calls.delete_job(job_id))

    async def start_ranking(
        self,
        data: Data,
        *,
        backbones: Iterable[str | PretrainedBackbone] = (),
        time_budget_s: float | None = None,
        seed: int | None = None,
        case_sensitive_labels: bool = False,
        request_id: str = "",
        on_upload: OnProgress | None = None,
    ) -> AsyncRankingHandle:
        """As `Client.start_ranking`."""
        given = _requests.listed(backbones)
        # Bad options are found out before anything is uploaded.
        _calls.rank_backbones("", given, time_budget_s, seed)
        source = await asyncio.to_thread(
            _uploads.stored, data, on_upload, case_sensitive_labels=case_sensitive_labels
        )
        if isinstance(source, Upload):
            await self._transport.unary(_calls.check_rank_backbones(given, time_budget_s, seed))
        call = _calls.rank_backbones(
            await self._sent(source),
            given,
            time_budget_s,
            seed,
            case_sensitive_labels=case_sensitive_labels,
            request_id=request_id,
        )
        return AsyncRankingHandle(self, await self._transport.unary(call))

    async def rank_backbones(
        self,
        data: Data,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RankOptions],
    ) -> BackboneRanking:
        """As `Client.rank_backbones`."""
        started = await self.start_ranking(data, **options)
        longest_s = timeout_s or ranking_timeout_s(options.get("time_budget_s"))
        return await started.result(longest_s)

    # Backbones

    async def register_backbone(
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
        """As `Client.register_backbone`."""
        described = _backbones.described(name, size, mean, std, layout, output, licence, sha256)
        given = await asyncio.to_thread(_backbones.registration, path, described, on_progress)

        async def send(left_s: float) -> Backbone:
            rpc = _rpcs.REGISTER_BACKBONE
            answer = await self._transport.collect(rpc, given.messages(), left_s)
            return _answers.backbone(answer.backbone)

        return await self._transport.attempts(
            send, timeout_s, is_safe=_rpcs.REGISTER_BACKBONE.is_safe
        )

    def list_backbones(self) -> AsyncIterator[Backbone]:
        """As `Client.list_backbones`."""
        return self._transport.pages(_calls.list_backbones)

    async def delete_backbone(self, name: str) -> None:
        """As `Client.delete_backbone`."""
        await self._transport.unary(_calls.delete_backbone(name))

    # Prediction

    async def predict(
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
        """As `Client.predict`; an iterable is read on a worker thread."""
        (predictions,) = await self.predict_many(
            images,
            [ModelSpec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            timeout_s=timeout_s,
        )
        return predictions

    async def predict_many(
        self,
        images: ImageLike | Iterable[ImageLike],
        models: Iterable[str | ModelSpec],
        *,
        top_k: int = 1,
        include_features: bool = False,
        timeout_s: float | None = None,
    ) -> list[list[Prediction]]:
        """As `Client.predict_many`; an iterable is read on a worker thread."""
        specs = model_specs(models)
        requests = predict_requests(images, specs, top_k=top_k, include_features=include_features)
        found: list[list[Prediction]] = [[] for _ in specs]
        async for request in stepwise(requests):
            answers = await self._transport.unary(_calls.predict(request), timeout_s)
            for of_one, more in zip(found, answers, strict=True):
                of_one.extend(more)
        return found

    async def predict_stream(
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
    ) -> AsyncIterator[Prediction]:
        """As `Client.predict_stream`; an iterable is read on a worker thread."""
        requests = predict_requests(
            images,
            [model_spec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            max_images=IMAGES_A_REQUEST,
        )
        order, room = Order(), asyncio.Semaphore(REQUESTS_UNDER_WAY)

        async def messages() -> AsyncIterator[prediction_pb2.PredictStreamRequest]:
            async for request in stepwise(requests):
                await room.acquire()
                yield order.to_send(request)

        answers = self._transport.exchange(_rpcs.PREDICT_STREAM, messages(), timeout_s)
        async with aclosing(answers):
            async for answer in answers:
                for predictions in order.take(answer):
                    room.release()
                    for prediction in predictions:
                        yield prediction
        if not order.is_complete:
            raise Unavailable(f"{self._transport.target} ended the stream before its last answer")

    # Models

    async def get_model(self, model: str) -> Model:
        """As `Client.get_model`."""
        return await self._transport.unary(_calls.get_model(model))

    def list_models(self) -> AsyncIterator[Model]:
        """As `Client.list_models`."""
        return self._transport.pages(_calls.list_models)

    async def delete_model(self, model: str, *, force: bool = False) -> None:
        """As `Client.delete_model`."""
        await self._transport.unary(_calls.delete_model(model, force))

    async def get_version(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> Version:
        """As `Client.get_version`."""
        return await self._transport.unary(_calls.get_version(model, version, alias))

    def list_versions(self, model: str) -> AsyncIterator[Version]:
        """As `Client.list_versions`."""
        return self._transport.pages(lambda token: _calls.list_versions(model, token))

    async def delete_version(self, model: str, version: int) -> None:
        """As `Client.delete_version`."""
        await self._transport.unary(_calls.delete_version(model, version))

    async def set_alias(self, model: str, alias: str, version: int) -> Model:
        """As `Client.set_alias`."""
        return await self._transport.unary(_calls.set_alias(model, alias, version))

    async def delete_alias(self, model: str, alias: str) -> Model:
        """As `Client.delete_alias`."""
        return await self._transport.unary(_calls.delete_alias(model, alias))

    async def rollback_alias(self, model: str, alias: str = "latest") -> Rollback:
        """As `Client.rollback_alias`."""
        return await self._transport.unary(_calls.rollback_alias(model, alias))

    async def promote_version(self, model: str, version: int) -> Model:
        """As `Client.promote_version`."""
        return await self._transport.unary(_calls.promote_version(model, version))

    async def get_report(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> dict[str, Any]:
        """As `Client.get_report`."""
        return await self._transport.unary(_calls.get_report(model, version, alias))

    async def get_report_html(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> str:
        """As `Client.get_report_html`."""
        return await self._transport.unary(_calls.get_report_html(model, version, alias))

    async def export_model(
        self,
        model: str,
        path: str | PathLike[str],
        *,
        version: int | None = None,
        alias: str | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Path:
        """As `Client.export_model`."""
        request, to = _calls.export_request(model, version, alias), Path(path)

        async def write(left_s: float) -> Path:
            answers = self._transport.answers(_rpcs.EXPORT_MODEL, request, left_s)
            async with aclosing(answers):
                with whole_file(to) as file:
                    async for answer in answers:
                        await asyncio.to_thread(file.write, answer.chunk)
            return to

        return await self._transport.attempts(write, timeout_s, is_safe=_rpcs.EXPORT_MODEL.is_safe)

    # Health

    async def is_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
        """As `Client.is_serving`."""
        return await self.why_not_serving(timeout_s) is None

    async def why_not_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        """Does as `Client.why_not_serving`."""
        try:
            is_serving = await self._transport.probe(timeout_s, wait=False)
        except GraftError as error:
            return (await self._transport.explained(error)).message
        return None if is_serving else f"{self._transport.target} {NOT_SERVING}"

    async def wait_ready(self, timeout_s: float = 30.0) -> None:
        """As `Client.wait_ready`."""
        patience = _channel.Patience(self._transport.target, timeout_s)
        while True:
            try:
                if await self._transport.probe(patience.probe_s, wait=True):
                    return
                patience.error = None
            except (Unavailable, DeadlineExceeded) as error:
                patience.error = error
            if patience.is_over:
                last = patience.error
                why = "" if last is None else (await self._transport.explained(last)).message
                raise patience.gave_up(why)
            await asyncio.sleep(_channel.PROBE_PAUSE_S)
