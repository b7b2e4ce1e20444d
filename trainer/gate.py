"""Whether a version reaches what its request asked of it; says so, decides nothing.

The service publishes what passes and keeps the rest as candidates.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc

from service.domain import GateCheck, Parity
from service.inference.head import Floats
from service.inference.preprocess import Pixels
from service.inference.runtime import Session
from service.jobs.contract import Gate
from trainer.evaluate import Metrics

Bools = npt.NDArray[np.bool_]

SIGNIFICANCE = 0.05
_RUNS = 15


def checks(
    gate: Gate,
    metrics: Metrics,
    parity: Parity,
    right: Bools,
    incumbent_right: Bools | None,
    latency_ms: Callable[[], float],
    incumbent_problem: str = "",
) -> list[GateCheck]:
    """The conditions that the gate names, in the proto's order.

    `right` and `incumbent_right` bool [n] say which validation images the new
    version and the one behind `gate.not_worse_than` answered right; None where
    there is none yet, or where `incumbent_problem` says why it cannot be asked.
    """
    found: list[GateCheck] = []
    if gate.min_accuracy is not None:
        value, bound = metrics.accuracy, gate.min_accuracy
        found.append(
            _check("accuracy", value >= bound, value, bound, f"validation accuracy {value:.4f}, at "
                   f"least {bound:.4f} was asked for")
        )  # fmt: skip
    if gate.not_worse_than:
        alias = gate.not_worse_than
        if incumbent_problem:
            # What cannot be compared has not passed.
            told = f"the version behind {alias} could not be compared with: {incumbent_problem}"
            found.append(_check("not_worse", False, 0.0, SIGNIFICANCE, told))
        else:
            found.append(_not_worse(alias, right, incumbent_right))
    if gate.max_parity_difference is not None:
        value, bound = parity.max_difference, gate.max_parity_difference
        found.append(
            _check("parity", value <= bound, value, bound, f"PyTorch and ONNX Runtime differ by "
                   f"{value:.2g} in a probability, at most {bound:.2g} was asked for")
        )  # fmt: skip
    if gate.max_latency_ms is not None:
        value, bound = latency_ms(), gate.max_latency_ms
        found.append(
            _check("latency", value <= bound, value, bound, f"one image takes {value:.1f} ms, at "
                   f"most {bound:.1f} ms were asked for")
        )  # fmt: skip
    return found


def measure_latency_ms(
    decode: Sequence[Callable[[], Pixels]],
    session: Session,
    probabilities: Callable[[Floats], object],
) -> float:
    """Median milliseconds of an image, decoding included, one at a time.

    `decode` are images as uint8 [224, 224, 3], made when called.
    """
    taken = []
    for run in range(_RUNS + 1):
        started = time.perf_counter()
        pixels = decode[run % len(decode)]()
        probabilities(session.run(pixels[None]))
        taken.append(time.perf_counter() - started)
    # The first one warms the kernels for its shape.
    return float(np.median(taken[1:])) * 1000


def _not_worse(alias: str, right: Bools, incumbent_right: Bools | None) -> GateCheck:
    if incumbent_right is None:
        detail = f"no version is behind {alias} yet"
        return _check("not_worse", True, 1.0, SIGNIFICANCE, detail)
    lost = int((incumbent_right & ~right).sum())
    won = int((right & ~incumbent_right).sum())
    # McNemar 1947, exact and one-sided: were both as good, an image on which they differ
    # would be lost or won by the toss of a coin.
    p = float(bdtrc(lost - 1, lost + won, 0.5)) if lost else 1.0
    detail = (
        f"accuracy {right.mean():.4f} against {incumbent_right.mean():.4f} of the version behind "
        f"{alias} on the same {len(right)} images: {lost} lost, {won} won, p = {p:.3g}"
    )
    return _check("not_worse", p > SIGNIFICANCE, p, SIGNIFICANCE, detail)


def _check(name: str, passed: bool, value: float, bound: float, detail: str) -> GateCheck:
    return GateCheck(name=name, passed=passed, value=value, bound=bound, detail=detail)  # type: ignore[arg-type]
