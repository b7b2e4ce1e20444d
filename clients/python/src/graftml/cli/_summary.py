"""Sums up what many images were classified as."""

import json
import sys
from dataclasses import dataclass

from graftml.cli._output import Output
from graftml.types import Prediction


@dataclass
class _Answered:
    """The images that a model answered with one class, or with none."""

    count: int = 0
    probabilities: float = 0.0
    unlike: int = 0
    """The training images, by their outlier score."""


class Summary:
    """Counts images by model and class."""

    def __init__(self) -> None:
        self.images = 0
        self.failed = 0
        self._answered: dict[tuple[str, str | None], _Answered] = {}

    def add(self, names: list[str], by_model: tuple[Prediction, ...]) -> None:
        """Counts an image's answers, of the models by their names."""
        self.images += 1
        if by_model[0].error is not None:
            self.failed += 1
            return
        for name, prediction in zip(names, by_model, strict=True):
            answered = self._answered.setdefault((name, prediction.label), _Answered())
            answered.count += 1
            answered.probabilities += prediction.probability or 0.0
            answered.unlike += prediction.is_out_of_distribution

    def show(self, output: Output, *, is_beside: bool) -> None:
        """Prints it, on standard error where `is_beside`, and as JSON."""
        if output.is_json:
            print(json.dumps({"summary": self._as_json()}), file=sys.stderr)
            return
        file = sys.stderr if is_beside else sys.stdout
        several = len({name for name, _ in self._answered}) > 1
        columns = ["class", "images", "mean probability", "unlike the training images"]
        rows: list[list[object]] = []
        for (name, label), answered in self._sorted():
            mean = None if label is None else f"{answered.probabilities / answered.count:.1%}"
            row = ["none" if label is None else label, answered.count, mean, answered.unlike]
            rows.append([name, *row] if several else row)
        print(file=file)
        output.table(["model", *columns] if several else columns, rows, file=file)
        failed = f", of which {self.failed} failed" if self.failed else ""
        print(f"{self.images} images{failed}", file=file)

    def _sorted(self) -> list[tuple[tuple[str, str | None], _Answered]]:
        """Each model's classes by name, and none after them."""
        return sorted(
            self._answered.items(), key=lambda item: (item[0][0], item[0][1] is None, item[0][1])
        )

    def _as_json(self) -> dict[str, object]:
        classes = [
            {
                "model": name,
                "label": label,
                "count": answered.count,
                "mean_probability": answered.probabilities / answered.count
                if label is not None
                else None,
                "out_of_distribution_count": answered.unlike,
            }
            for (name, label), answered in self._sorted()
        ]
        return {"images": self.images, "failed": self.failed, "classes": classes}
