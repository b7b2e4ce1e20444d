"""What a finished model is held against: its gate, the version before it, the baselines."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.domain import GateCheck, Parity
from service.errors import GraftError
from service.inference import head as heads
from service.inference import preprocess
from service.inference.head import Floats
from service.inference.preprocess import Pixels
from service.inference.providers import choose_provider
from service.inference.runtime import OnnxRuntime
from service.jobs.contract import Incumbent, Note
from trainer import baselines as others
from trainer import gate
from trainer.data import Part
from trainer.evaluate import Metrics
from trainer.job import Job
from trainer.reporting.comparisons import Measured
from trainer.transfer import Transferred

Bools = npt.NDArray[np.bool_]

_LATENCY_IMAGES = 8
_BUDGET_PART = 0.8
"""Of what is left of the job's time that baselines may take."""


def gate_checks(
    job: Job, found: Transferred, metrics: Metrics, probabilities: Floats, parity: Parity
) -> list[GateCheck]:
    """How the version does at the conditions that its request named."""
    asked = job.spec.gate
    if asked is None:
        return []
    validation = found.data.validation
    right = probabilities.argmax(axis=1) == validation.targets
    incumbent, problem = None, ""
    if job.spec.incumbent is not None and asked.not_worse_than:
        try:
            incumbent = _right(job, job.spec.incumbent, validation, found.data.classes)
        except (GraftError, OSError, ValueError) as error:
            problem = f"version {job.spec.incumbent.version} may be gone or damaged ({error})"
            job.send(Note("warning", problem))
    latency = partial(_latency_ms, job, found)
    return gate.checks(asked, metrics, parity, right, incumbent, latency, problem)


def baselines(job: Job, found: Transferred) -> list[Measured]:
    """Answers of what the job asked to be compared with, on the validation images."""
    spec = job.spec
    budget_s = None
    if spec.time_budget_s is not None:
        left_s = spec.time_budget_s - (time.monotonic() - job.started)
        budget_s = max(1.0, left_s * _BUDGET_PART)
    bench = others.Bench(
        spec=spec,
        data=found.source,
        measured=found.data.validation,
        frozen=job.frozen,
        first_head=lambda: job.first_head(found.source),
        budget_s=budget_s,
        send=job.send,
    )
    return others.measure(bench, found.method)


def _right(job: Job, incumbent: Incumbent, part: Part, classes: tuple[str, ...]) -> Bools:
    """Which images the version before answers right; raises what loading it raises."""
    path = Path(incumbent.backbone_path)
    head = heads.load(Path(incumbent.head_path), incumbent.head_digest)
    # The file's name is its digest, so what is known of the images counts.
    seen = replace(part, decoding=incumbent.decoding)
    features = job.features_of_file(path, path.stem).of(seen, "the version before")
    answers = head.probabilities(features).argmax(axis=1)
    named = np.array(head.classes, dtype=object)[answers]
    true = np.array(classes, dtype=object)[part.targets]
    right: Bools = (named == true).astype(np.bool_)
    return right


def _latency_ms(job: Job, found: Transferred) -> float:
    spec, validation = job.spec, found.data.validation
    # As the engine runs a lone image: on all cores.
    runtime = OnnxRuntime(choose_provider(spec.provider), spec.threads, spec.precision)
    session = runtime.load(found.served.file)
    places = validation.spread(_LATENCY_IMAGES)
    decode: list[Callable[[], Pixels]] = [
        partial(preprocess.decode, validation.encoded(place), validation.decoding)
        for place in places
    ]
    return gate.measure_latency_ms(decode, session, found.served.head.probabilities)
