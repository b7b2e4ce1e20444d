"""Metrics: limits on labels, and gauges that are counted when they are scraped."""

import urllib.request

from prometheus_client import generate_latest

from service.ops.metrics import OTHER_MODELS, Metrics
from service.ops.metrics_server import MetricsServer


def test_models_past_the_bound_share_a_label() -> None:
    metrics = Metrics({"version": "1"}, max_model_labels=2)
    labels = [metrics.model_label(f"m{n}") for n in range(5)]
    assert labels == ["m0", "m1", OTHER_MODELS, OTHER_MODELS, OTHER_MODELS]
    assert metrics.model_label("m1") == "m1"


def test_a_deleted_models_label_is_free_for_another() -> None:
    metrics = Metrics({"version": "1"}, max_model_labels=2)
    for number in range(50):
        name = f"m{number}"
        metrics.stages(name).count("ok")
        assert metrics.model_label(name) == name
        metrics.forget_model(name)
    assert not [line for line in _exposed(metrics) if 'model="m' in line]


def test_what_ends_after_a_models_deletion_brings_no_series_back() -> None:
    metrics = Metrics({"version": "1"})
    under_way = metrics.stages("m")
    under_way.count("IMAGE_UNREADABLE")
    metrics.forget_model("m")
    for outcome in ("ok", "IMAGE_UNREADABLE", "IMAGE_TOO_LARGE"):
        under_way.count(outcome)
    under_way.total.observe(1.0)
    under_way.outlier_score.observe(0.5)
    under_way.compare_with("d", [0.5])
    assert not [line for line in _exposed(metrics) if 'model="m"' in line]


def test_a_model_made_again_under_a_deleted_ones_name_counts_from_zero() -> None:
    metrics = Metrics({"version": "1"})
    metrics.stages("m").count("ok")
    metrics.forget_model("m")
    metrics.stages("m").count("ok")
    label = {"model": "m", "outcome": "ok"}
    assert metrics.registry.get_sample_value("graft_images_total", label) == 1


def test_deleting_a_model_without_a_label_of_its_own_leaves_the_shared_ones() -> None:
    metrics = Metrics({"version": "1"}, max_model_labels=1)
    for name in ("m0", "m1", "m2"):
        metrics.stages(name).count("ok")
    metrics.forget_model("m1")
    label = {"model": OTHER_MODELS, "outcome": "ok"}
    assert metrics.registry.get_sample_value("graft_images_total", label) == 2


def _exposed(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_a_finished_job_gives_back_a_label_that_only_it_used() -> None:
    metrics = Metrics({"version": "1"}, max_model_labels=1)
    metrics.epoch["train_loss"].labels("job-1", metrics.model_label("failed")).set(0.5)
    metrics.forget_job("job-1", "failed")
    assert metrics.model_label("served") == "served"
    metrics.stages("served")
    metrics.forget_job("job-2", "served")
    assert metrics.model_label("another") == OTHER_MODELS


def test_a_jobs_series_are_dropped_although_its_label_changed_while_it_ran() -> None:
    metrics = Metrics({"version": "1"}, max_model_labels=1)
    metrics.model_label("first")
    metrics.epoch["train_loss"].labels("job-1", metrics.model_label("m")).set(0.5)
    metrics.forget_model("first")
    metrics.epoch["train_loss"].labels("job-1", metrics.model_label("m")).set(0.4)
    metrics.forget_job("job-1", "m")
    assert not [line for line in _exposed(metrics) if "job-1" in line]


def test_a_finished_jobs_series_are_dropped() -> None:
    metrics = Metrics({"version": "1"})
    metrics.epoch["train_loss"].labels("job-1", "m").set(0.5)
    label = {"job_id": "job-1", "model": "m"}
    assert metrics.registry.get_sample_value("graft_training_train_loss", label) == 0.5
    metrics.model_label("m")
    metrics.forget_job("job-1", "m")
    assert metrics.registry.get_sample_value("graft_training_train_loss", label) is None


def test_counts_are_taken_when_scraped_over_http() -> None:
    metrics = Metrics({"version": "7"})
    counts = {"QUEUED": 1}
    metrics.watch_counts("jobs", "Jobs.", "state", lambda: counts)
    server = MetricsServer(metrics.registry, "127.0.0.1", 0, lambda: True)
    try:
        counts["QUEUED"] = 5
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode()
    finally:
        server.close()
    assert 'graft_jobs{state="QUEUED"} 5.0' in text
    assert 'graft_build_info{version="7"} 1.0' in text
    assert "process_resident_memory_bytes" in text
