"""Defines all metrics, with their labels, buckets and limits, in this process's registry.

Knows nothing of what is measured: other packages get a `Metrics` and record to it.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily

_SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
_OUTLIER_SCORES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 3)
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128)

# A series beside each counter and histogram that says when it began: nobody asks.
disable_created_metrics()  # type: ignore[no-untyped-call]

OTHER_MODELS: Final = "(other)"


class Metrics:
    """Holds all metrics of the service.

    The first `max_model_labels` model names become label values, until their model is
    deleted; further ones share the value "(other)", so that the number of series is
    bounded however many models there are. `versions` names the software that runs, and
    becomes the labels of `graft_build_info`.
    """

    def __init__(self, versions: Mapping[str, str], max_model_labels: int = 100) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._lock = threading.Lock()
        self._model_labels: set[str] = set()
        self._max_model_labels = max_model_labels
        self._stages: dict[str, Stages] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"graft_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"graft_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS
        ) -> Histogram:
            return Histogram(f"graft_{name}", text, labels, registry=registry, buckets=buckets)

        self.rpc_calls = counter(
            "rpc_calls", "Completed calls, by method and status code.", "method", "code"
        )
        self.rpc_seconds = histogram("rpc_duration_seconds", "Duration of calls.", "method")
        self.rpc_active = gauge("rpc_active", "Calls in progress.", "method")
        self.refused_calls = counter(
            "refused_calls", "Calls refused by authentication, role or quota, by reason.", "reason"
        )
        self.reloads = counter(
            "reloads",
            "Reloads of the access_file or the certificate: ok or failed.",
            "what",
            "outcome",
        )
        self.reload_failing = gauge(
            "reload_failing",
            "1 while the last reload of the access_file or the certificate failed, and the "
            "previous one is still used.",
            "what",
        )
        self.next_token_expiry = gauge(
            "token_next_expiry_timestamp_seconds",
            "When the next token of the access file expires, Unix time; +Inf if none does.",
        )
        self.next_token_expiry.set(float("inf"))
        self.certificate_expiry = gauge(
            "certificate_expiry_timestamp_seconds",
            "When the port's certificate expires, Unix time; +Inf without one.",
        )
        self.certificate_expiry.set(float("inf"))
        self.stage_seconds = histogram(
            "predict_stage_seconds",
            "Time of an image in each stage of Predict: decode, queue, infer, total.",
            "stage",
            "model",
        )
        self.images = counter(
            "images",
            "Classified images, by model and outcome (ok or the reason of the error).",
            "model",
            "outcome",
        )
        self.outlier_score = histogram(
            "outlier_score",
            "Outlier score of an image against the training images; above 1 is out of "
            "distribution. Origin validation: the held-out images of the last version asked.",
            "model",
            "origin",
            buckets=_OUTLIER_SCORES,
        )
        self.batch_size = histogram(
            "batch_size", "Images in one run of a backbone.", buckets=_BATCH
        )
        self.recent_features = counter(
            "recent_features",
            "Lookups of an image's features among those of recent images: hit or miss.",
            "outcome",
        )
        self.recent_features_bytes = gauge(
            "recent_features_bytes", "Bytes of recent images' features in memory, estimated."
        )
        self.recent_features_limit = gauge(
            "recent_features_bytes_limit",
            "Limit on graft_recent_features_bytes; 0 means that none are kept.",
        )
        self.queue_depth = gauge("queue_depth", "Images that wait for inference.")
        self.queue_limit = gauge(
            "queue_limit", "Limit on graft_queue_depth; more images are refused."
        )
        self.data_free_bytes = gauge("data_free_bytes", "Free bytes on the data folder's disk.")
        self.data_disk_bytes = gauge("data_disk_bytes", "Size of the data folder's disk.")
        self.loads = counter(
            "loads", "Backbones and heads loaded into memory, by outcome.", "kind", "outcome"
        )
        self.hits = counter(
            "loaded_hits", "Lookups that found the backbone or head in memory.", "kind"
        )
        self.eviction_age_seconds = histogram(
            "eviction_age_seconds",
            "Time from the last use to the eviction; low ages mean too little memory.",
            "kind",
            buckets=(1, 10, 60, 300, 1800, 7200, 43_200, 172_800),
        )
        self.evictions = counter(
            "evictions", "Backbones and heads unloaded to stay within the memory limit.", "kind"
        )
        self.loaded = gauge("loaded", "Backbones and heads in memory.", "kind")
        self.loaded_bytes = gauge(
            "loaded_bytes", "Bytes of loaded backbones and heads, estimated.", "kind"
        )
        self.blobs_damaged = counter(
            "blobs_damaged", "Stored files that were found damaged or missing when read."
        )
        self.loaded_bytes_limit = gauge("loaded_bytes_limit", "Limit on graft_loaded_bytes.")
        self.jobs_ended = counter("jobs_ended", "Completed jobs, by final state.", "state")
        self.versions_published = counter(
            "versions_published",
            "Versions made, by outcome (published or candidate), whether they are calibrated (yes "
            "or no) and the worst verdict of their gates (passed, undecided, failed or none).",
            "outcome",
            "calibrated",
            "gate",
        )
        self.job_seconds = histogram(
            "job_duration_seconds",
            "Time from a job's start to its end.",
            "method",
            buckets=(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400),
        )
        epoch = ("job_id", "model")
        self.epoch: dict[str, Gauge] = {
            "epoch": gauge("training_epoch", "Completed epochs of a running job.", *epoch),
            "epochs": gauge("training_epochs_planned", "Planned epochs of a running job.", *epoch),
            "train_loss": gauge("training_train_loss", "Training loss of the last epoch.", *epoch),
            "train_accuracy": gauge(
                "training_train_accuracy", "Training accuracy of the last epoch.", *epoch
            ),
            "validation_loss": gauge(
                "training_validation_loss", "Validation loss of the last epoch.", *epoch
            ),
            "validation_accuracy": gauge(
                "training_validation_accuracy", "Validation accuracy of the last epoch.", *epoch
            ),
            "images_per_second": gauge(
                "training_images_per_second", "Training speed of the last epoch.", *epoch
            ),
            "eta_s": gauge("training_eta_seconds", "Estimated time until training ends.", *epoch),
        }
        self.provider_info = gauge(
            "provider_info",
            "Always 1; the execution provider until backbones are measured, and why it was chosen.",
            "provider",
            "precision",
            "why",
        )
        self.cpu_cores = gauge(
            "cpu_cores",
            "Cores at the start: logical CPUs that the process may run on, physical cores among "
            "them, the quota of its control groups where there is one, and those available to "
            "it after all.",
            "kind",
        )
        self.providers_chosen = counter(
            "providers_chosen_total",
            "Backbone files, by the provider that was measured to be fastest for runs on so many "
            "cores.",
            "provider",
            "precision",
            "cores",
        )
        self.measurements_pending = gauge(
            "measurements_pending", "Backbone files that wait to be measured."
        )
        build_info = gauge("build_info", "Always 1; versions of the running software.", *versions)
        build_info.labels(*versions.values()).set(1)

    def calls(self, method: str) -> "Calls":
        """Returns a method's series of calls."""
        return Calls(self.rpc_active, self.rpc_calls, self.rpc_seconds, method)

    def stages(self, model: str) -> "Stages":
        """Returns a model's series for predictions; cached, since looking labels up is slow."""
        label = self.model_label(model)
        found = self._stages.get(label)
        if found is None:
            found = self._stages[label] = Stages(
                self.stage_seconds, self.images, self.outlier_score, label
            )
        return found

    def model_label(self, model: str) -> str:
        """Returns the label value for a model: its name, or "(other)" past the limit."""
        with self._lock:
            if model in self._model_labels:
                return model
            if len(self._model_labels) < self._max_model_labels:
                self._model_labels.add(model)
                return model
        return OTHER_MODELS

    def watch_counts(
        self, name: str, text: str, label: str, counts: Callable[[], Mapping[str, int]]
    ) -> None:
        """Adds a gauge that is computed on each scrape, with a series for each key of `counts`."""
        self.registry.register(_Counted(f"graft_{name}", text, label, counts))

    def forget_model(self, model: str) -> None:
        """Removes a deleted model's series and frees its label for another model.

        Calls that are still under way are not counted. Counts under "(other)" stay.
        """
        with self._lock:
            self._model_labels.discard(model)
        stages = self._stages.pop(model, None)
        if stages is not None:
            stages.forget()

    def forget_job(self, job_id: str, model: str) -> None:
        """Removes the series of a job that has ended, and a model's label that only it used."""
        for gauge in self.epoch.values():
            # A label may have become free while the job ran.
            for label in (model, OTHER_MODELS):
                _remove(gauge, job_id, label)
        if model not in self._stages:
            with self._lock:
                self._model_labels.discard(model)


class Calls:
    """Holds one method's series of calls, since looking labels up takes as long as counting."""

    def __init__(self, active: Gauge, ended: Counter, seconds: Histogram, method: str) -> None:
        self.active = active.labels(method)
        self.seconds = seconds.labels(method)
        self._ended = ended
        self._method = method
        self._by_code: dict[str, Counter] = {}

    def ended(self, code: str) -> None:
        """Counts a call by the name of its status code."""
        counter = self._by_code.get(code)
        if counter is None:
            counter = self._by_code[code] = self._ended.labels(self._method, code)
        counter.inc()


_STAGES: Final = ("decode", "queue", "infer", "total")


class Stages:
    """Holds one model's series: the stages of Predict, images by outcome, outlier scores."""

    def __init__(
        self, seconds: Histogram, images: Counter, outlier_score: Histogram, label: str
    ) -> None:
        self.decode, self.queue, self.infer, self.total = (
            seconds.labels(stage, label) for stage in _STAGES
        )
        self._seconds = seconds
        self._images = images
        self._label = label
        self._ok = images.labels(label, "ok")
        self._refused: set[str] = set()
        self._is_forgotten = False
        self._outlier_scores = outlier_score
        self.outlier_score = outlier_score.labels(label, "live")
        self._compared_with = ""

    def compare_with(self, head_digest: str, scores: Iterable[float]) -> None:
        """Replaces the validation scores shown beside the live ones by this version's."""
        if head_digest == self._compared_with or self._label == OTHER_MODELS or self._is_forgotten:
            return
        if self._compared_with:
            self._outlier_scores.remove(self._label, "validation")
        self._compared_with = head_digest
        validation = self._outlier_scores.labels(self._label, "validation")
        for score in scores:
            validation.observe(float(score))

    def count(self, outcome: str) -> None:
        """Counts one image by its outcome, `ok` or a reason."""
        if outcome == "ok":
            self._ok.inc()
        elif not self._is_forgotten:
            self._refused.add(outcome)
            self._images.labels(self._label, outcome).inc()

    def forget(self) -> None:
        """Removes the series; later counts and scores make no new ones."""
        self._is_forgotten = True
        for stage in _STAGES:
            _remove(self._seconds, stage, self._label)
        for outcome in ("ok", *self._refused):
            _remove(self._images, self._label, outcome)
        for origin in ("live", "validation"):
            _remove(self._outlier_scores, self._label, origin)


def _remove(metric: Counter | Gauge | Histogram, *labels: str) -> None:
    # Older clients raise for a series that is not there, newer ones do not.
    with suppress(KeyError):
        metric.remove(*labels)


class _Counted:
    def __init__(
        self, name: str, text: str, label: str, counts: Callable[[], Mapping[str, int]]
    ) -> None:
        self._name, self._text, self._label, self._counts = name, text, label, counts

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily(self._name, self._text, labels=[self._label])]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=[self._label])
        for key, count in self._counts().items():
            family.add_metric([key], count)
        return [family]
