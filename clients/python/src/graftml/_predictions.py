"""Which models are asked, and what became of the images that were to be classified.

A part of `graftml.types`, which callers take these from.
"""

from dataclasses import dataclass, field

from graftml import _display
from graftml._options import Decision
from graftml.errors import GraftError


@dataclass(frozen=True)
class ModelSpec:
    """A model that `predict_many` asks: by version, by alias, or `latest`."""

    model: str
    version: int | None = None
    alias: str | None = None
    decision: Decision | None = None
    """How probabilities become an answer, instead of the version's own."""


@dataclass(frozen=True)
class ClassScore:
    """One class's share."""

    label: str
    probability: float
    class_index: int


@dataclass(frozen=True)
class Prediction:
    """What became of one image: an answer and scores, or the error that it failed with.

    `label` and `probability` are the answer's, None where no class reaches its threshold;
    for an image that failed they raise its error, so that a failure cannot pass for an
    answer.
    """

    model: str
    version: int | None
    scores: tuple[ClassScore, ...] = ()
    """The most probable first, whatever the decision."""
    features: tuple[float, ...] = field(default=(), repr=False)
    """The backbone's features, where asked for."""
    error: GraftError | None = None
    out_of_distribution_score: float | None = None
    """How unlike the training images it is: 19 of 20 of their kind lie below 1. None for
    versions that were made without it."""
    is_out_of_distribution: bool = False
    """Whether that score is above 1: the probabilities mean little then."""
    calibrated: bool = False
    """Whether the version's probabilities were shown to be right on images that nothing was
    learned from."""
    answer: ClassScore | None = None
    """What it is taken for, by the call's decision or the version's; it need not be among the
    scores. None where no class reaches its threshold."""

    @property
    def label(self) -> str | None:
        """The class of the answer."""
        answer = self._answer()
        return None if answer is None else answer.label

    @property
    def probability(self) -> float | None:
        """The answer's probability, 0 to 1."""
        answer = self._answer()
        return None if answer is None else answer.probability

    def _repr_html_(self) -> str:
        version = "" if self.version is None else f" version {self.version}"
        title = f"{self.model}{version}"
        if self.error is not None:
            return _display.table(title, [("error", self.error.message)])
        decided = "none" if self.answer is None else self.answer.label
        is_strange = "unlike the training images" if self.is_out_of_distribution else None
        return _display.table(
            title,
            [
                ("answer", decided),
                *((score.label, f"{score.probability:.1%}") for score in self.scores),
                ("warning", is_strange),
                ("probabilities", None if self.calibrated else "not calibrated"),
            ],
        )

    def _answer(self) -> ClassScore | None:
        if self.error is not None:
            raise self.error
        return self.answer
