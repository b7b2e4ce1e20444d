"""The figure of a version that nothing really measured."""

from service.domain import Figure, MeasuredOn


def figure(
    accuracy: float = 1.0, count: int = 3, measured_on: MeasuredOn = "cross_validation"
) -> Figure:
    """An accuracy over so many lone images, with an interval of some width."""
    return Figure(
        measured_on=measured_on,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.25),
        accuracy_high=min(1.0, accuracy + 0.25),
        loss=0.7,
        count=count,
        groups=count,
    )
