"""The rules and the dashboard by themselves: sound, tested, explained, about what is there."""

import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client import generate_latest

from service.ops.metrics import Metrics
from tests.deploy import queries
from tests.deploy.queries import DEPLOY, PROMETHEUS, Query
from tests.e2e.conftest import GUARD_S

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, a part of Prometheus, is not on the PATH"
)

ALL = queries.rule_queries() + queries.dashboard_queries()
RECORDED = {rule["record"] for rule in queries.rules() if "record" in rule}


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool, a part of Alertmanager, is not on the PATH"
)
def test_amtool_finds_no_fault() -> None:
    done = subprocess.run(
        ["amtool", "check-config", DEPLOY / "alertmanager" / "alertmanager.yml"],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_and_tickets_are_told_apart() -> None:
    config = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    (pages,) = config["route"]["routes"]
    assert pages["matchers"] == ['severity="page"']
    named = {pages["receiver"], config["route"]["receiver"]}
    assert named == {receiver["name"] for receiver in config["receivers"]} == {"pages", "tickets"}
    told = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["alerting"]
    (target,) = told["alertmanagers"][0]["static_configs"][0]["targets"]
    assert (
        target.partition(":")[0]
        in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    )


def test_each_alert_is_tested_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in queries.alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.parametrize("alert", queries.alerts(), ids=lambda alert: alert["alert"])
def test_each_alert_says_what_it_means_and_where_to_read_on(alert: dict[str, object]) -> None:
    notes = alert["annotations"]
    assert isinstance(notes, dict)
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert alert["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    page, _, anchor = notes["runbook_url"].partition("#")
    # The file's head says how to put another in the place of its beginning.
    assert page == "https://runbooks.example.com/graft/RUNBOOK.md"
    assert anchor == str(alert["alert"]).lower()
    headings = re.findall(r"^#+ (.+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)
    assert anchor in {heading.strip("`").lower() for heading in headings}


@pytest.mark.parametrize("query", ALL, ids=lambda query: query.where)
def test_every_metric_and_label_exists(query: Query) -> None:
    exposed = queries.exposed() | queries.OF_PROMETHEUS
    named = queries.metrics_of(query.expr)
    assert named
    known = set(queries.ADDED_BY_PROMETHEUS)
    for name, labels in named.items():
        if name in RECORDED:
            known |= {"method", "code"}
            continue
        assert name in exposed
        assert labels <= exposed[name] | queries.ADDED_BY_PROMETHEUS, name
        known |= exposed[name]
    assert queries.groupings_of(query.expr) <= known
    assert query.labels_shown <= known


def test_what_an_alert_speaks_of_is_on_the_dashboard() -> None:
    recorded = {
        rule["record"]: set(queries.metrics_of(rule["expr"]))
        for rule in queries.rules()
        if "record" in rule
    }
    spoken_of = {
        metric
        for alert in queries.alerts()
        for name in queries.metrics_of(alert["expr"])
        for metric in recorded.get(name, {name})
    }
    shown = {
        name for query in queries.dashboard_queries() for name in queries.metrics_of(query.expr)
    }
    assert spoken_of - shown == set()


def test_no_series_says_when_another_began() -> None:
    page = generate_latest(Metrics({"version": "1"}).registry).decode()
    assert "graft_blobs_damaged_total 0.0" in page
    assert "_created" not in page


def test_a_metric_that_is_not_there_is_noticed() -> None:
    exposed = queries.exposed()
    assert "graft_jobs" in exposed
    assert exposed["graft_rpc_duration_seconds_bucket"] == {"method", "le"}
    assert "graft_rpc_calls" not in queries.metrics_of("graft_rpc_calls_total")
    found = queries.metrics_of('sum by (x) (rate(graft_made_up_total{colour="red"}[5m]))')
    assert found == {"graft_made_up_total": {"colour"}}
    assert "graft_made_up_total" not in exposed


def test_the_variables_ask_for_labels_that_exist() -> None:
    exposed = queries.exposed()
    variables = {v["name"]: v for v in queries.dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "instance", "model"}
    for name in ("instance", "model"):
        metric, label = re.fullmatch(  # type: ignore[union-attr]
            r"label_values\((\w+), (\w+)\)", variables[name]["query"]["query"]
        ).groups()
        assert label in exposed[metric] | queries.ADDED_BY_PROMETHEUS


@pytest.mark.parametrize("panel", queries.panels(), ids=lambda panel: panel["title"])
def test_each_panel_is_explained_and_has_a_unit(panel: dict[str, object]) -> None:
    assert str(panel["description"]).endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]  # type: ignore[index]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = queries.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_grafana_finds_what_is_provisioned() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "graft.yml").read_text())["providers"]
    mounts = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
