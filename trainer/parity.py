"""The proof that what serves answers as PyTorch does, on the job's own images.

What PyTorch makes of an image is kept beside the features, so that a job on
images that were checked before needs no torch at all. A registered backbone has no
network in PyTorch: it is compared with what ONNX Runtime's CPU provider makes of it.
"""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from service.domain import Parity, Precision
from service.engine.feature_cache import FeatureCache
from service.engine.head import Floats, Head
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from service.errors import Internal, Reason
from trainer.backbone_file import BackboneFile, decoding
from trainer.data import Files
from trainer.features import Features, Source

if TYPE_CHECKING:
    from trainer.backbones import Backbone

MAX_DIFFERENCE = 1e-3
"""Of a probability, between torch and what serves."""
NEW_IMAGES = 32
"""Compared where the backbone's file is new."""
KNOWN_IMAGES = 8
"""Compared where an earlier job's check of the same file was passed."""


class Reference(Source, Protocol):
    """What answers are compared with."""

    title: str

    def close(self) -> None:
        """Ends its use."""


def check(
    head: Head,
    served: Features,
    reference: "Reference",
    checked: Files,
    cache: FeatureCache | None,
    threads: int,
) -> Parity:
    """Compares the head's answers on features of what serves and of a reference.

    Raises GraftError (PARITY_FAILED) when a probability differs by more than 1e-3.
    """
    detail = f"{reference.title} against what serves"
    answers = head.probabilities(served.all_of(checked, detail))
    try:
        wanted = head.probabilities(Features(reference, cache, threads).all_of(checked, detail))
    finally:
        reference.close()
    difference = float(np.abs(answers - wanted).max())
    agreement = float((answers.argmax(axis=1) == wanted.argmax(axis=1)).mean())
    # Written so that NaN fails too.
    if not difference <= MAX_DIFFERENCE:
        raise Internal(
            Reason.PARITY_FAILED,
            f"the exported model differs from {reference.title} by {difference:.2g} in a "
            f"probability (at most {MAX_DIFFERENCE:g} is allowed; {agreement:.0%} of the best "
            f"classes agree) on {len(checked)} validation images: it was not published",
        )
    return Parity(difference, agreement, len(checked))


class TorchBackbone:
    """A `Reference`: the backbone as PyTorch computes it, on the CPU in full precision."""

    title = "PyTorch"
    precision: Precision = "fp32"

    def __init__(self, name: str, weights: str, load: Callable[[], "Backbone"]) -> None:
        self.space = f"torch {metadata.version('torch')} {name} {weights} {decoding()}"
        self._load = load
        self._threads_before = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """As those of what serves: it is asked for all of them alone."""
        return ()

    def load(self) -> Session:
        """Loads its weights; errors as `backbones.load`."""
        backbone = self._load()
        import torch

        # Torch's own threads spin for each other: on busy cores, two of them took five
        # times as long as two runs side by side.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        return _TorchSession(backbone)

    def close(self) -> None:
        """Gives torch its threads back."""
        if self._threads_before:
            import torch

            torch.set_num_threads(self._threads_before)


class PlainBackbone(BackboneFile):
    """A `Reference`: a registered file on ONNX Runtime's CPU provider, in full precision."""

    title = "ONNX Runtime on the CPU"

    def __init__(self, path: Path, digest: str, threads: int) -> None:
        super().__init__(
            path, OnnxRuntime(Provider("cpu", "for the check"), threads, is_narrow=True), digest
        )

    def close(self) -> None:
        """Leaves nothing to end."""


class _TorchSession:
    nbytes = 0
    precision: Precision = "fp32"
    made_for: Precision = "fp32"
    max_batch = 1
    infer_s = 0.0

    def __init__(self, backbone: "Backbone") -> None:
        self._backbone = backbone
        self.size, self.feature_dim = backbone.size, backbone.feature_dim

    def run(self, images: Pixels, cores: int = 0) -> Floats:  # noqa: ARG002 - always one
        from trainer import export

        return export.torch_features(self._backbone, images)
