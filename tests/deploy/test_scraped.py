"""A real Prometheus scrapes a real service that really works: every query is answered."""

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from graftml import Client, NotAllowed, NotFound

from tests.certificates import Authority
from tests.deploy import queries
from tests.deploy.queries import PROMETHEUS, Query
from tests.deploy.sample_image import IMAGES, QUICK
from tests.e2e.conftest import GUARD_S, ServiceProcess

SCRAPED_EVERY_S = 1
ASKED_EVERY_S = 0.25

SECRET = "s" * 43
TOKEN = f"graft_tester_{SECRET}"
ACCESS = f"""
[tenants.acme]

[[tokens]]
id = "tester"
sha256 = "{hashlib.sha256(SECRET.encode()).hexdigest()}"
tenant = "acme"
roles = ["admin"]
expires = 2099-01-01T00:00:00Z
"""

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on the PATH"),
]


class Prometheus:
    """One running Prometheus, by its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=GUARD_S) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{query}", timeout=GUARD_S
        ) as answer:
            return json.load(answer)["data"]

    def numbers(self, expr: str) -> list[float]:
        """The values of an expression now, those left out that are none."""
        values = [float(s["value"][1]) for s in self.get("query", query=expr)["result"]]
        return [value for value in values if value == value]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def service(tmp_path: Path, authority: Authority) -> Iterator[ServiceProcess]:
    cert, key = authority.sign().write(tmp_path, "server")
    access = tmp_path / "access.toml"
    access.touch(mode=0o600)
    access.write_text(ACCESS)
    flags = (
        # Room for next to nothing, so that heads push backbones out and evictions are seen.
        "--model-memory-mb=1",
        "--cpu-jobs=1",
        "--threads=1",
        "--trainer-threads=1",
        f"--tls-cert-file={cert}",
        f"--tls-key-file={key}",
        f"--access-file={access}",
    )
    running = ServiceProcess(tmp_path / "data", *flags)
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
def prometheus(service: ServiceProcess, tmp_path: Path) -> Iterator[Prometheus]:
    """With the shipped configuration and rules, but for the target's address and a faster pace."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    pace = f"{SCRAPED_EVERY_S}s"
    config["global"] = dict.fromkeys(config["global"], pace)
    (graft,) = (s for s in config["scrape_configs"] if s["job_name"] == "graft")
    target = urllib.parse.urlsplit(service.metrics_url).netloc
    graft["static_configs"] = [{"targets": [target]}]
    config["scrape_configs"] = [graft]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            try:
                process.wait(GUARD_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(client: Client, stranger: Client) -> None:
    """A good image, a bad one, a model that is not there, and a call without a token."""
    client.predict([IMAGES[0][1], b"no image"], model="colours")
    with contextlib.suppress(NotFound):
        client.predict(IMAGES[0][1], model="missing")
    with contextlib.suppress(NotAllowed):
        stranger.predict(IMAGES[0][1], model="colours")


def as_grafana_asks(query: Query) -> str:
    return (
        query.expr.replace("$__rate_interval", f"{10 * SCRAPED_EVERY_S}s")
        .replace("$instance", ".*")
        .replace("$model", ".*")
    )


def test_every_panel_has_data_and_every_rule_is_evaluated(
    service: ServiceProcess, prometheus: Prometheus, authority: Authority
) -> None:
    trust = grpc.ssl_channel_credentials(authority.pem)
    with (
        Client(service.address, timeout_s=GUARD_S, credentials=trust, token=TOKEN) as client,
        Client(service.address, timeout_s=GUARD_S, credentials=trust) as stranger,
    ):
        client.wait_ready(timeout_s=GUARD_S)
        job = client.fine_tune(IMAGES, name="colours", **QUICK)
        # Takes the slot next, and stays until it is cancelled.
        longer = client.fine_tune(
            IMAGES,
            name="longer",
            method="model_based",
            epochs=1000,
            **QUICK,
        )
        job.wait(timeout_s=GUARD_S)
        deadline = time.monotonic() + GUARD_S

        without = {query.where: as_grafana_asks(query) for query in queries.dashboard_queries()}
        # An alert is silent when all is well; what is recorded for it is there.
        without |= {rule["record"]: rule["record"] for rule in queries.rules() if "record" in rule}
        while without and time.monotonic() < deadline:
            # The trainer wants the cores, too.
            time.sleep(ASKED_EVERY_S)
            ask(client, stranger)
            if prometheus.is_ready():
                without = {w: e for w, e in without.items() if not prometheus.numbers(e)}
        assert not without, f"{without}\n{''.join(service.seen)[-4000:]}"

        rules = prometheus.rules()
        while any(rule["health"] == "unknown" for rule in rules) and time.monotonic() < deadline:
            rules = prometheus.rules()
        assert {rule["name"] for rule in rules} == {q.where for q in queries.rule_queries()}
        assert {
            rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"
        } == {}

        client.cancel_job(longer.job_id)
