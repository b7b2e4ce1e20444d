"""In which order scores and costs put backbones, and what is said of it."""

import numpy as np

from service.contract import RankedBackbone
from trainer import ranking


class Scored:
    """A backbone as it is once it was scored."""

    def __init__(self, name: str, losses: np.ndarray, log_me: float, image_ms: float = 5.0) -> None:
        self.losses = losses
        held = losses[~np.isnan(losses)]
        self.row = RankedBackbone(
            backbone=name,
            weights="w",
            log_loss=float(held.mean()) if len(held) else None,
            log_me=log_me,
            image_ms=image_ms,
        )


def order(*scored: Scored, images: int = 100) -> tuple[list[str], str]:
    found, why = ranking.ordered(scored, images)
    return [each.row.backbone for each in found], why


NOISE = np.random.default_rng(0).exponential(1.0, 100)
WIDE = np.random.default_rng(1).normal(0, 1, 100)
"""Differences between two backbones' losses that chance alone would make."""


def test_the_loss_sorts_where_it_tells() -> None:
    best, middle, worst = (
        Scored(name, NOISE + more, log_me)
        for name, more, log_me in (("a", 0.0, 0.1), ("b", 0.5, 0.2), ("c", 0.9, 0.3))
    )
    found, why = order(worst, best, middle)
    assert found == ["a", "b", "c"]
    assert why.startswith("a is first: on 100 images a head on its features does best")


def test_log_me_decides_within_a_standard_error_of_the_least_loss() -> None:
    level = WIDE - WIDE.mean() + 0.05 * WIDE.std()
    least, other = Scored("least", NOISE, 0.1), Scored("other", NOISE + level, 0.2, 9.0)
    worse = Scored("worse", NOISE + level + 3 * WIDE.std() / 10, 0.9)
    # Ten nats in all: `least` is no longer close, however cheap.
    found, why = order(least, worse, other)
    assert found == ["other", "least", "worse"]
    assert "a head on its features does best" in why


def test_cost_decides_only_where_neither_score_shows_a_difference() -> None:
    level = WIDE - WIDE.mean() + 0.09 * WIDE.std()
    best = Scored("best", NOISE, 0.10, 9.0)
    found, why = order(best, Scored("cheap", NOISE + level, 0.08, 3.0))
    assert found == ["cheap", "best"]
    assert "it is the cheapest; best scores best, by no more than chance explains" in why
    # LogME's lead is 3 nats of all images, or the losses differ by more than a standard error.
    assert order(best, Scored("cheap", NOISE + level, 0.06, 3.0))[0] == ["best", "cheap"]
    shown = WIDE - WIDE.mean() + 0.11 * WIDE.std()
    assert order(best, Scored("cheap", NOISE + shown, 0.10, 3.0))[0] == ["best", "cheap"]
    # A tenth of the cost is none.
    found, why = order(best, Scored("cheap", NOISE + level, 0.08, 8.5))
    assert found == ["best", "cheap"]
    assert "it is the best by its scores, and none is clearly cheaper" in why


def test_where_nothing_could_be_held_out_log_me_decides_alone() -> None:
    unknown = np.full(10, np.nan)
    good, bad = Scored("good", unknown, 0.5), Scored("bad", unknown, 0.1, 1.0)
    assert order(bad, good, images=100)[0] == ["good", "bad"]
    level = Scored("level", unknown, 0.45, 1.0)
    assert order(level, good, images=100)[0] == ["good", "level"]
    assert order(level, good, images=50)[0] == ["level", "good"]


def test_few_images_let_cost_decide_nothing() -> None:
    best, cheap = Scored("best", NOISE[:29], 0.1), Scored("cheap", NOISE[:29], 0.1, 1.0)
    assert order(best, cheap, images=30)[0] == ["cheap", "best"]
    found, why = order(best, cheap, images=29)
    assert found == ["best", "cheap"]
    assert why.endswith("So few images let cost decide nothing.")
