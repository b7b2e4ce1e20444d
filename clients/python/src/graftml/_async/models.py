"""The client's methods for models, their versions, aliases and files."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from typing import Any

from graftml_stubs.v1 import model_pb2 as pb

from graftml import _answers
from graftml import _async_io as io
from graftml._async.transport import AsyncTransport
from graftml._channel import TRANSFER_TIMEOUT_S
from graftml._encoding import message
from graftml._files import whole_file
from graftml._requests import version_of
from graftml._rpcs import is_safe
from graftml.types import Model, Rollback, Version


class AsyncModels:
    """Looks after published models."""

    _transport: AsyncTransport

    async def get_model(self, model: str) -> Model:
        """Describes one model."""
        request = message(pb.GetModelRequest, model=model)
        answer = await self._transport.unary(self._transport.models.GetModel, request)
        return _answers.model(answer.model)

    def list_models(
        self, *, name_prefix: str = "", labels: Mapping[str, str] | None = None
    ) -> AsyncIterator[Model]:
        """Iterates over the models, by name; those of which a version has all `labels`."""
        return self._transport.pages(
            self._transport.models.ListModels,
            message(pb.ListModelsRequest, name_prefix=name_prefix, labels=labels),
            lambda answer: map(_answers.model, answer.models),
        )

    async def delete_model(self, model: str, *, force: bool = False) -> None:
        """Deletes a model with all its versions and aliases; there is no way back.

        A model that aliases other than `latest` name is deleted with `force` alone; without
        it FailedPrecondition (MODEL_IN_USE) is raised.
        """
        request = message(pb.DeleteModelRequest, model=model, force=force)
        await self._transport.unary(self._transport.models.DeleteModel, request)

    async def get_version(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> Version:
        """Describes one version; the newest where neither `version` nor `alias` is given."""
        request = message(pb.GetVersionRequest, **version_of(model, version, alias))
        answer = await self._transport.unary(self._transport.models.GetVersion, request)
        return _answers.version(answer.version)

    def list_versions(self, model: str) -> AsyncIterator[Version]:
        """Iterates over a model's versions, newest first."""
        return self._transport.pages(
            self._transport.models.ListVersions,
            message(pb.ListVersionsRequest, model=model),
            lambda answer: map(_answers.version, answer.versions),
        )

    async def delete_version(self, model: str, version: int) -> None:
        """Deletes a version; the last one goes only with its model."""
        request = message(pb.DeleteVersionRequest, model=model, version=version)
        await self._transport.unary(self._transport.models.DeleteVersion, request)

    async def set_alias(self, model: str, alias: str, version: int) -> Model:
        """Points an alias to a version; makes the alias if it is new."""
        request = message(pb.SetAliasRequest, model=model, alias=alias, version=version)
        answer = await self._transport.unary(self._transport.models.SetAlias, request)
        return _answers.model(answer.model)

    async def delete_alias(self, model: str, alias: str) -> Model:
        """Removes an alias."""
        request = message(pb.DeleteAliasRequest, model=model, alias=alias)
        answer = await self._transport.unary(self._transport.models.DeleteAlias, request)
        return _answers.model(answer.model)

    async def rollback_alias(self, model: str, alias: str = "latest") -> Rollback:
        """Points an alias back to the version before; again, to the one before that."""
        request = message(pb.RollbackAliasRequest, model=model, alias=alias)
        answer = await self._transport.unary(self._transport.models.RollbackAlias, request)
        return _answers.rollback(answer)

    async def promote_version(self, model: str, version: int) -> Model:
        """Publishes a candidate although it did not pass its gate; `latest` moves to it."""
        request = message(pb.PromoteVersionRequest, model=model, version=version)
        answer = await self._transport.unary(self._transport.models.PromoteVersion, request)
        return _answers.model(answer.model)

    async def get_report(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> dict[str, Any]:
        """Returns the report that training wrote, for programs."""
        content = await self._report(model, version, alias, pb.REPORT_FORMAT_JSON)
        report: dict[str, Any] = json.loads(content)
        return report

    async def get_report_html(
        self, model: str, *, version: int | None = None, alias: str | None = None
    ) -> str:
        """Returns the report as one page for people."""
        content = await self._report(model, version, alias, pb.REPORT_FORMAT_HTML)
        return str(content, "utf-8")

    async def _report(
        self, model: str, version: int | None, alias: str | None, format_: pb.ReportFormat
    ) -> bytes:
        named = version_of(model, version, alias)
        request = message(pb.GetReportRequest, format=format_, **named)
        answer = await self._transport.unary(self._transport.models.GetReport, request)
        return answer.content

    async def export_model(
        self,
        model: str,
        path: str | PathLike[str],
        *,
        version: int | None = None,
        alias: str | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Path:
        """Writes one self-contained .onnx file, whole or not at all; returns its path."""
        request = message(pb.ExportModelRequest, **version_of(model, version, alias))
        to = Path(path)

        async def write(left_s: float) -> Path:
            answers = self._transport.answers(self._transport.models.ExportModel, request, left_s)
            async with aclosing(answers):
                with whole_file(to) as file:
                    async for answer in answers:
                        await io.blocking(file.write, answer.chunk)
            return to

        return await self._transport.attempts(write, timeout_s, is_safe=is_safe(request))
