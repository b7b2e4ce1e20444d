"""What a version pays for int8 and gains by it, as its job measured it."""

import msgspec


class QuantisationCost(msgspec.Struct, frozen=True, kw_only=True):
    """A version's price of int8 and its gain, by images that neither form learned from."""

    images: int
    """Images that were compared."""
    groups: int
    """Of images that belong together among them."""
    fp32_accuracy: float
    """Accuracy in fp32."""
    accuracy_difference: float
    """Accuracy in int8 minus that in fp32."""
    accuracy_difference_low: float
    """Of the 95 % interval for matched proportions (Tango 1998), widened by the groups."""
    accuracy_difference_high: float
    log_loss_difference: float
    """Nats."""
    changed_answers: float
    """Part of the answers that are not the same."""
    fp32_ms: float
    """Of an image on one core of the machine that made the version, decoding left out."""
    int8_ms: float
    """The same in int8."""
