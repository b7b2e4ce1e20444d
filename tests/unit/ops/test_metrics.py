"""Bounds on labels, gauges that are counted when asked, log lines."""

import json
import logging
import urllib.request
from collections.abc import Iterator
from typing import Literal

import pytest
from prometheus_client import generate_latest

from service.ops import metrics
from service.ops.escaping import escaped
from service.ops.metrics import OTHER_MODELS, Metrics, set_up_logging
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


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_the_request_id_and_what_was_given(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("json", "info")
    metrics.request_id.set("abc")
    logging.getLogger("x").info("hello", extra={"job_id": "j1"})
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["level"], line["job_id"]) == ("hello", "INFO", "j1")
    assert line["request_id"] == "abc"


def test_console_lines_are_for_people(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("console", "info")
    logging.getLogger("x").debug("unseen")
    logging.getLogger("x").info("hello", extra={"job_id": "j1"})
    line = capsys.readouterr().err
    assert "unseen" not in line
    assert "INFO" in line
    assert "hello" in line
    assert "job_id=j1" in line


@pytest.mark.parametrize("style", ["json", "console"])
def test_names_of_strangers_forge_no_line_and_reach_no_terminal(
    style: Literal["json", "console"],
    root_logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "\x1b]52;c;aGk=\x07\n2026-01-01 00:00:00 ERROR forged\r\x9b31m\u202e\u2028\x7f"
    set_up_logging(style, "info")
    try:
        raise ValueError(evil)
    except ValueError:
        logging.getLogger("x").exception("no %s", evil, extra={"name_of_file": evil})
    lines = capsys.readouterr().err.split("\n")
    assert all(escaped(line) == line for line in lines)
    assert sum(line.startswith(("{", "20")) for line in lines) == 1
