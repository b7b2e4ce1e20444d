"""What the rules and the dashboard ask of Prometheus, and which metrics and labels that names."""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.ops.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "graft.json"

# Prometheus adds these to whatever it scrapes, and the alerts' own name.
OF_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate"}}
ADDED_BY_PROMETHEUS = {"job", "instance"}

_SELECTOR = re.compile(r"\b(graft[_:][a-z0-9_:]+|process_[a-z_]+|up|ALERTS)\b\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Query:
    """An expression, and where it stands."""

    where: str
    expr: str
    labels_shown: frozenset[str] = frozenset()
    """Of the legend or the annotations."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def rule_queries() -> list[Query]:
    return [
        Query(
            rule.get("alert") or rule["record"],
            rule["expr"],
            frozenset(re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {})))),
        )
        for rule in rules()
    ]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    return [
        Query(
            f"{panel['title']} {target['refId']}",
            target["expr"],
            frozenset(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])),
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def metrics_of(expr: str) -> dict[str, set[str]]:
    """The metrics that an expression names, each with the labels that it matches."""
    found: dict[str, set[str]] = {}
    for name, matchers in _SELECTOR.findall(_GROUPING.sub(" ", expr)):
        found.setdefault(name, set()).update(_MATCHER.findall(matchers))
    return found


def groupings_of(expr: str) -> set[str]:
    """The labels that an expression groups or joins by."""
    listed = ",".join(_GROUPING.findall(expr))
    return {label.strip() for label in listed.split(",") if label.strip()}


def exposed() -> dict[str, set[str]]:
    """Every series name that the service exposes, with its labels."""
    metrics = Metrics({"version": "1", "python": "3", "onnxruntime": "1"})
    for name, label in _counted_when_scraped():
        metrics.watch_counts(name, "", label, lambda: {"one": 1})
    found: dict[str, set[str]] = {}
    for collector in list(metrics.registry._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for name in metrics.registry._collector_to_names[collector]:
            found[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _counted_when_scraped() -> list[tuple[str, str]]:
    # The gauges that the composition root adds; read from it, so that none is made up here.
    tree = ast.parse((ROOT / "service" / "app.py").read_text())
    return [
        (ast.literal_eval(call.args[0]), ast.literal_eval(call.args[2]))
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "watch_counts"
    ]
