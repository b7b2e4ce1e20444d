"""Tables of what was measured: ratios within rounds, their medians and ranges.

A cell is one load on one way to serve; it has one run in every round.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.running import spread

WORTH = 0.97
"""Least part of the best provider's speed that the defaults are to reach."""
AGREE = 1e-3
"""Largest difference of a probability between providers of one precision."""
PLAIN = "plain server"
DEFAULTS = "defaults"
BARE = ("bare loop", "bare loop as served")
"""The latter decodes and runs as the service does on its defaults."""
OPEN_PART = 0.7
"""Of the capacity just measured: the rate of the open loop."""
OPEN = f"open loop at {OPEN_PART}"
BUSY_PERCENT = 10
"""Of a core, that other programs may take of an undisturbed run."""


class Cell(NamedTuple):
    """A load on one way to serve a version."""

    precision: str
    served: str
    """`PLAIN`, `DEFAULTS`, a provider set by hand, or a bare loop."""
    load: str


@dataclass
class Backbone:
    """What was measured with one backbone."""

    title: str
    runs: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    """Providers of the defaults, by precision."""
    differences: dict[tuple[str, str], float] = field(default_factory=dict)
    """Largest difference of a probability from the first provider's set by hand, by precision
    and provider."""
    memory_mib: dict[str, float] = field(default_factory=dict)

    def by_hand(self, precision: str, *, agree: bool) -> list[str]:
        """Lists the providers set by hand that agree on a precision, or those that do not."""
        return [
            name
            for name in dict.fromkeys(c.served for c in self.runs if c.precision == precision)
            if name not in (PLAIN, DEFAULTS, *BARE)
            and (self.differences.get((precision, name), 0.0) <= AGREE) == agree
        ]

    def best_by_hand(self, precision: str, load: str) -> str:
        """Names the one that agrees and answers most images a second, by the median."""
        names = self.by_hand(precision, agree=True)
        return max(names, key=lambda name: self.median(Cell(precision, name, load)))

    def median(self, cell: Cell, key: str = "per_second") -> float:
        """Returns the median over rounds."""
        return float(statistics.median(run[key] for run in self.runs[cell]))

    def ratio(self, above: Cell, below: Cell, key: str = "per_second") -> str:
        """Formats ratios taken within rounds; a dash where one of the two was not measured."""
        if above not in self.runs or below not in self.runs:
            return "-"
        return spread(ratios(self.runs[above], self.runs[below], key), ".2f")


def ratios(above: list[dict[str, Any]], below: list[dict[str, Any]], key: str) -> list[float]:
    """Divides what was measured in the same round; machines drift from round to round."""
    return [a[key] / b[key] for a, b in zip(above, below, strict=True)]


def figures(found: Backbone) -> Iterator[str]:
    """All that was measured, in lines of Markdown; ratios are of images/s, or of the p99."""
    keys = {
        "p50_ms": "p50 ms", "p99_ms": "p99 ms", "cpu_ms": "CPU ms an image",
        "generator_cpu_percent": "generator, % of a core",
        "others_cpu_percent": "others, % of a core",
    }  # fmt: skip
    ratios_of = ("the plain server", "the plain server in fp32", "the bare loop",
                 "the bare loop as served by default")  # fmt: skip
    yield from head("Precision", "Served by", "Load", "images/s", *keys.values(), "errors",
                    *(f"of {one}" for one in ratios_of))  # fmt: skip
    for cell, runs in found.runs.items():
        medians = [f"{found.median(cell, key):.1f}" for key in keys]
        loop = {"1 caller": "one loop", "one loop": "one loop", OPEN: ""}.get(
            cell.load, "a loop a core"
        )
        below = [cell._replace(served=PLAIN), cell._replace(served=PLAIN, precision="fp32")]
        below += [Cell(cell.precision, bare, loop) for bare in BARE]
        key = "p99_ms" if cell.load == OPEN else "per_second"
        rates, errors = [run["per_second"] for run in runs], sum(run["errors"] for run in runs)
        of = [found.ratio(cell, one, key) for one in below]
        yield row(*cell, spread(rates), *medians, str(errors), *of)
    yield ""
    for name, mib in found.memory_mib.items():
        yield f"- {name}: {mib:.0f} MiB (PSS) with all versions"
    for (precision, name), difference in found.differences.items():
        yield f"- {precision}, {name}: probabilities differ by {difference:.1g} at most"


def verdicts(found: Backbone) -> Iterator[str]:
    """Whether the defaults are near the best provider set by hand, and above a plain server."""
    for own in found.runs:
        precision, name, load = own
        if name != DEFAULTS or load == OPEN:
            continue
        best = found.best_by_hand(precision, load)
        others = {f"the best set by hand, {best}": (own._replace(served=best), WORTH)}
        for each in found.by_hand(precision, agree=False):
            others[f"{each}, whose answers differ"] = own._replace(served=each), 0.0
        for of in dict.fromkeys((precision, "fp32")):
            others[f"the plain server in {of}"] = Cell(of, PLAIN, load), 1.0
        chosen = f"{found.title}, {precision}, {load}: the defaults ({found.chosen[precision]})"
        for title, (other, least) in others.items():
            if other not in found.runs:
                continue
            rates = ratios(found.runs[own], found.runs[other], "per_second")
            yield (
                f"- {chosen} answer {spread(rates, '.2f')} of the images/s of {title}, with "
                f"{found.ratio(own, other, 'cpu_ms')} of its CPU time an image"
                + (f": BELOW {least}" if statistics.median(rates) < least else "")
            )


def disturbances(every: Iterable[Backbone]) -> str:
    """Says how busy other programs and the load generator kept the cores."""
    runs = [run for found in every for own in found.runs.values() for run in own]
    others = [run["others_cpu_percent"] for run in runs]
    busy = sum(one > BUSY_PERCENT for one in others)
    share = [run["generator_cpu_percent"] for run in runs if run["generator_cpu_percent"]]
    return (
        f"Other programs took {spread(others, '.0f')} % of a core, and more than {BUSY_PERCENT} % "
        f"in {busy} of {len(runs)} runs; the load generator, on the same cores, took "
        f"{spread(share, '.0f')} %."
    )


def summary(every: list[Backbone]) -> Iterator[str]:
    """The table for people: the plain server and the defaults, at one caller and at 32."""
    yield from head("Network, precision", "Served by", "1 caller: p50 ms", "32 callers: images/s",
                    "1 and 32 callers: of the plain server's images/s", "of the plain server's in "
                    "fp32", "of the best provider set by hand")  # fmt: skip
    for found in every:
        for one in found.runs:
            precision, name, load = one
            if name not in (PLAIN, DEFAULTS) or load != "1 caller":
                continue
            both = (one, one._replace(load="32 callers"))
            plain = [found.ratio(cell, cell._replace(served=PLAIN)) for cell in both]
            fp32 = [found.ratio(c, c._replace(served=PLAIN, precision="fp32")) for c in both]
            best = [
                found.ratio(cell, cell._replace(served=found.best_by_hand(precision, cell.load)))
                for cell in both
            ]
            is_plain = name == PLAIN
            yield row(
                f"{found.title}, {precision}",
                name if is_plain else f"Graft ({found.chosen[precision]})",
                spread([run["p50_ms"] for run in found.runs[one]]),
                spread([run["per_second"] for run in found.runs[both[1]]]),
                "1" if is_plain else ", ".join(plain),
                "1" if is_plain and precision == "fp32" else ", ".join(fp32),
                "-" if is_plain else ", ".join(best),
            )


def head(*names: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield row(*names)
    yield row(*("---" for _ in names))


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
