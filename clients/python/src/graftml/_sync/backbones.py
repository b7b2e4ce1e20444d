# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client's methods for backbones."""

from collections.abc import Iterator, Sequence
from os import PathLike

from graftml_stubs.v1 import backbone_pb2 as pb

from graftml import _answers, _backbones
from graftml import _sync_io as io
from graftml._backbones import Layout
from graftml._channel import TRANSFER_TIMEOUT_S
from graftml._encoding import message
from graftml._sync.transport import Transport
from graftml._uploads import OnProgress
from graftml.types import Backbone


class Backbones:
    """Keeps backbones of one's own, and lists those that are there."""

    _transport: Transport

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
        given = io.blocking(_backbones.registration, path, described, on_progress)

        def send(left_s: float) -> Backbone:
            answer = self._transport.collect(
                self._transport.backbones.RegisterBackbone, given.messages(), left_s
            )
            return _answers.backbone(answer.backbone)

        # The same file under the same name again changes nothing.
        return self._transport.attempts(send, timeout_s, is_safe=True)

    def list_backbones(self) -> Iterator[Backbone]:
        """Iterates, by name, over backbones that jobs can start from without a download."""
        return self._transport.pages(
            self._transport.backbones.ListBackbones,
            pb.ListBackbonesRequest(),
            lambda answer: map(_answers.backbone, answer.backbones),
        )

    def delete_backbone(self, name: str) -> None:
        """Deletes a registered backbone that no version and no open job is on."""
        request = message(pb.DeleteBackboneRequest, name=name)
        self._transport.unary(self._transport.backbones.DeleteBackbone, request)
