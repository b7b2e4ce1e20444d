"""The gate against an incumbent, simulated: how often it passes, fails and cannot tell.

Answers are drawn as the truth says: a share of images changes between right and wrong, so that
the new version is truly as much worse as is set. Reported are the verdicts of the trainer's gate.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.quality.document import Section, share
from bench.quality.measuring import Measuring, Sets
from service.contract import Gate
from trainer import gate

CHANGED = (0.02, 0.04, 0.08)
"""Shares of images on which the two versions differ; more where the difference alone is more."""
IMAGES = (50, 100, 400, 1000)
DIFFERENCES = (0.0, -0.02, -0.05, -0.20)
"""Accuracy of the new version less the incumbent's."""
BURSTS = (1, 5)
"""Images of a scene, which are answered alike."""
MARGIN = Gate().max_regression
RUNS = 2000
"""Simulated comparisons of each setting."""
_ACCURACY = 0.9
"""The incumbent's."""
_WORSE, _FEW, _MOST_PASSED = -0.05, 100, 0.05
_MANY, _LEAST_PASSED, _STEADY = 400, 0.80, (0.02, 0.04)


@dataclass(frozen=True)
class Setting:
    """Truth of a simulation."""

    changed: float
    images: int
    difference: float
    burst: int


@dataclass(frozen=True)
class Outcome:
    """The gate's verdicts."""

    setting: Setting
    verdicts: Counter[str]


def settings() -> list[Setting]:
    """Returns all that are simulated; bursts at one share of changed answers alone."""
    return [
        Setting(changed, images, difference, burst)
        for burst in BURSTS
        for changed in CHANGED
        for images in IMAGES
        for difference in DIFFERENCES
        if burst == 1 or changed == CHANGED[1]
    ]


def simulate(setting: Setting, runs: int, seed: int) -> Outcome:
    """Runs the gate `runs` times."""
    rng = np.random.default_rng([seed, round(1e4 * setting.changed), setting.images])
    changed = max(setting.changed, -setting.difference)
    lost, won = (changed - setting.difference) / 2, (changed + setting.difference) / 2
    scenes = setting.images // setting.burst
    verdicts: Counter[str] = Counter()
    for _ in range(runs):
        u = rng.random(scenes)
        incumbent = u < _ACCURACY
        new = ((u >= lost) & incumbent) | (u >= 1 - won)
        groups = np.arange(scenes).repeat(setting.burst)
        found = gate.non_inferiority(new[groups], incumbent[groups], groups, MARGIN)
        verdicts[found.verdict] += 1
    return Outcome(setting, verdicts)


def run(measuring: Measuring, _: argparse.Namespace) -> Section:
    """Simulates every setting."""
    return section(measuring.all(_simulated, [(setting, RUNS, 0) for setting in settings()])[0])


def _simulated(_: Sets, setting: Setting, runs: int, seed: int) -> Outcome:
    return simulate(setting, runs, seed)


def section(outcomes: Sequence[Outcome]) -> Section:
    """Writes down the verdicts and the two bounds."""
    found = Section("The gate against an incumbent")
    runs = sum(outcomes[0].verdicts.values()) if outcomes else 0
    found.say(
        f"`not_worse_than` with the default `max_regression`, {runs} simulated comparisons each: "
        "passed / undecided / failed, percent. Columns: how much worse the new version truly is, "
        "points. *Changed*: images on which one of the two alone is right (as many as the "
        "difference where that is more). *Scenes of 5*: five images each are answered alike, and "
        "known to belong together. Answers that are identical, with their probabilities, pass on "
        "any number of images; that is not simulated."
    )
    by = {o.setting: o.verdicts for o in outcomes}
    keys = list(dict.fromkeys((s.burst, s.changed, s.images) for s in by))
    rows = [
        (
            "lone images" if burst == 1 else f"scenes of {burst}",
            f"{100 * changed:.0f} %",
            str(images),
            *(_cell(by[Setting(changed, images, d, burst)]) for d in DIFFERENCES),
        )
        for burst, changed, images in keys
    ]
    found.table(("images are", "changed", "images", *(f"{100 * d:g}" for d in DIFFERENCES)), rows)
    for setting, verdicts in by.items():
        passed = verdicts["passed"]
        told = f"{share(passed, runs)}, {100 * setting.changed:.0f} % changed"
        if setting.burst > 1:
            continue
        if (setting.images, setting.difference) == (_FEW, _WORSE):
            found.bound(
                f"{_FEW} images, truly 5 points worse, passes in at most 5 %: {told}",
                passed <= _MOST_PASSED * runs,
            )
        if (setting.images, setting.difference) == (_MANY, 0.0) and setting.changed in _STEADY:
            found.bound(
                f"{_MANY} images, truly equal, passes in at least 80 %: {told}",
                passed >= _LEAST_PASSED * runs,
            )
    return found


def _cell(verdicts: Counter[str]) -> str:
    runs = sum(verdicts.values())
    return " / ".join(f"{100 * verdicts[v] / runs:.0f}" for v in ("passed", "undecided", "failed"))
