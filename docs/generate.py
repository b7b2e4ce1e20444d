"""Writes docs/reference/ from the code: `make generate`.

`--check` writes nothing and fails where a page is stale, so that none is edited by hand.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path

import msgspec
from graftml.cli._arguments import _parser as client_parser
from prometheus_client.metrics import MetricWrapperBase

from docs.report_fields import PLAIN
from service import config
from service.__main__ import command_line
from service.auth.principal import RULES
from service.errors import KINDS, Reason
from service.ops.metrics import Metrics
from trainer.reporting.report import Report

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto" / "graft" / "v1"
OUT = ROOT / "docs" / "reference"
RPC = re.compile(r"rpc (\w+)\((stream )?\w+\) returns \((stream )?")
STREAMS = {
    (False, False): "",
    (True, False): "request",
    (False, True): "response",
    (True, True): "both",
}
NOTE = "<!-- Written by `make generate` from {source}; edit that instead. -->\n"


def table(*head: str, rows: list[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def settings() -> str:
    """Returns the page of settings."""
    rows = [
        (
            f"`{config.variable(each.name)}`",
            f"`{config.flag(each.name)}`",
            f"`{config.shown(each.default)}`",
            each.metadata["text"],
        )
        for each in dataclasses.fields(config.Config)
    ]
    return f"""# Settings of the server

Each setting is a flag of `graft-server run`, an environment variable and a key of the file that
`--config` (or `GRAFT_CONFIG`) names: TOML, the flag's name with underscores, such as
`data_dir = "/srv/graft"`. A flag takes precedence over the environment, the environment over the
file, the file over the default. The settings are read once, at the start; an unknown key or an
invalid value ends the server with exit code 2 and one line that names it.

A list, such as `allowed_dirs`, is an array in the file; a path is relative to the folder in which
the server is started. `graft-server doctor` reads and checks the settings without serving, and
reports what they come to on this machine: processor, providers, and what was measured of each
backbone.

{table("Variable", "Flag", "Default", "Meaning", rows=rows)}
"""


def metrics() -> str:
    """Returns the page of metrics."""
    registered = Metrics({"version": "", "python": ""}).registry
    rows = []
    for metric in registered._collector_to_names:
        if isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            if name == "graft_build_info":
                labels = "one for each package"
            rows.append((f"`{name}`", metric._type, labels, metric._documentation))
    for name, text, label in _computed_metrics():
        rows.append((f"`graft_{name}`", "gauge", f"`{label}`", text))
    return f"""# Metrics

The server answers Prometheus at `/metrics` on the metrics port (`GRAFT_METRICS_PORT`, 9464). A
histogram `NAME` has the series `NAME_bucket`, `NAME_sum` and `NAME_count`. The label `model` is
`TENANT/NAME`, or `NAME` for the tenant `default`; it has at most 100 values, and further models
share `(other)`. Durations are in seconds. The process's own metrics (`process_*`) and those of
Python's garbage collector (`python_gc_*`) are there too.

Alerts on these metrics: [rules.yml](../../deploy/prometheus/rules.yml), with a
[runbook](../../deploy/RUNBOOK.md).

{table("Metric", "Type", "Labels", "Meaning", rows=sorted(rows))}
"""


def _computed_metrics() -> Iterator[tuple[str, str, str]]:
    """Yields the gauges that are computed on each scrape: their name, text and label."""
    for node in ast.walk(ast.parse((ROOT / "service/app.py").read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".watch_counts"):
            name, text, label = (ast.literal_eval(argument) for argument in node.args[:3])
            yield name, text, label


def errors() -> str:
    """Returns the page of error reasons."""
    said = _comments((PROTO / "error_reason.proto").read_text("utf-8"), r"ERROR_REASON_(\w+) = \d+")
    rows = []
    for reason in Reason:
        code = KINDS[reason].code
        text = re.sub(rf"\s*\({code}\)", "", said[reason])
        text = text.replace(f" ({code};", " (").replace("( ", "(")
        rows.append((f"`{reason}`", f"`{code}`", text))
    return f"""# Errors

Every error carries `google.rpc.ErrorInfo` with the domain `graft` and one of these reasons, in the
trailer `grpc-status-details-bin`. The status code says what kind of error it is, the reason which
one, the message what to do about it. `BadRequest` names the wrong field, `QuotaFailure` the quota,
`RetryInfo` when to try again. The error of a failed job has the same form.

In Python every reason is a member of `graftml.Reason` and the `reason` of a `graftml.GraftError`;
[the client's README](../../clients/python/README.md#errors-and-retries) lists the classes and what
is retried. Errors of connections have no reason:
[connection errors](../how-to/connection_errors.md).

{table("Reason", "Code", "Meaning, and what to do", rows=rows)}
"""


def _comments(proto: str, declared: str) -> dict[str, str]:
    """Maps what a .proto file declares to the comment above it, in one line."""
    pattern = re.compile(rf"((?:^ *//.*\n)+)^ *{declared}", re.MULTILINE)
    return {
        found[2]: " ".join(re.sub(r"^ *// ?", "", line) for line in found[1].splitlines()).strip()
        for found in pattern.finditer(proto)
    }


def grpc_contract() -> str:
    """Returns the page of RPCs."""
    parts = []
    for path in sorted(PROTO.glob("*.proto")):
        text = path.read_text("utf-8")
        for service in re.finditer(r"^service (\w+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            said = _comments(service[2], r"rpc (\w+)")
            rows = []
            for rpc in RPC.finditer(service[2]):
                roles = RULES[f"/graft.v1.{service[1]}/{rpc[1]}"]
                named = "any" if len(roles) == 3 else ", ".join(sorted(roles, reverse=True))
                streams = STREAMS[bool(rpc[2]), bool(rpc[3])]
                rows.append((f"`{rpc[1]}`", named, streams, _first_sentence(said[rpc[1]])))
            link = f"[{path.name}](../../proto/graft/v1/{path.name})"
            rpcs = table("RPC", "Role", "Streams", "What it does", rows=rows)
            parts.append(f"## {service[1]}\n\nDefined in {link}.\n\n{rpcs}\n")
    services = "\n".join(parts)
    return f"""# The gRPC contract

Package `graft.v1`. The files in [proto/graft/v1](../../proto/graft/v1) are the full reference:
every message, field and error is documented there. A role is that of the caller's token
([access](../how-to/access.md)); without an access file everybody has all of them. The server also
answers `grpc.health.v1.Health`, server reflection, and
[the Open Inference Protocol](open_inference.md).

Stubs: Python's are the package `graftml-stubs`; for other languages see
[the client's README](../../clients/python/README.md#other-languages).

{services}"""


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;]) +(?=[A-Z])", text, maxsplit=1)[0]


def client_commands() -> str:
    """Returns the page of the command `graft`."""
    parser = client_parser()
    everywhere = next(g for g in parser._action_groups if g.title == "everywhere")
    shared = {flag for action in everywhere._group_actions for flag in action.option_strings}
    return f"""# The command `graft`

Part of the package `graftml[cli]`. Every command takes these options, before or after its
name:

{_options(everywhere._group_actions)}

{_epilog(parser)}

{_commands(parser, shared)}"""


def server_commands() -> str:
    """Returns the page of the command `graft-server`."""
    parser = command_line()
    flags = {config.flag(f) for f in config.Config.__dataclass_fields__}
    return f"""# The command `graft-server`

Part of the package `graftml-server`. Commands that take the server's settings take them as
flags, from the environment and from a file: [settings](settings.md).

{_epilog(parser)}

{_commands(parser, flags)}"""


def _epilog(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.epilog.strip()}\n```" if parser.epilog else ""


def _commands(parser: argparse.ArgumentParser, hidden: set[str]) -> str:
    """Returns a section for each command below the parser, with tables of its arguments."""
    parts = []
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for name, command in action.choices.items():
            taken = {flag for each in command._actions for flag in each.option_strings}
            # A command that takes a few of them names these.
            omitted = (hidden if hidden <= taken else set()) | {"--help", "--version"}
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            own = [
                a
                for a in command._actions
                if not set(a.option_strings) & omitted
                and not isinstance(a, argparse._SubParsersAction)
            ]
            about = command.description or texts.get(name, "")
            part = f"## {command.prog}\n\n{_sentence(about)}"
            if own:
                part += "\n\n" + _options(own)
            if command.epilog:
                part += "\n\n" + _sentence(command.epilog)
            parts.append(part + "\n")
            parts.append(_commands(command, hidden))
    return "\n".join(part for part in parts if part)


def _sentence(text: str) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if line.endswith(".") else line + "."


def _options(actions: list[argparse.Action]) -> str:
    rows = []
    for action in actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if action.option_strings:
            taken = metavar or ("" if action.nargs == 0 else action.dest.upper())
            names = ", ".join(f"`{flag}`" for flag in action.option_strings)
            if taken and not action.choices:
                names += f" `{taken}`"
        else:
            names = f"`{metavar or action.dest.upper()}`"
        text = (action.help or "").replace("%(default)s", str(action.default))
        if action.choices:
            choices = ", ".join(f"`{choice}`" for choice in action.choices)
            text = f"{text}; one of {choices}" if text else f"one of {choices}"
        if action.required and action.option_strings:
            text = f"{text} (required)"
        rows.append((names, text.replace("%%", "%")))
    return table("Argument", "Meaning", rows=rows)


def report() -> str:
    """Returns the page of report.json."""
    structs = _structs(Report, [])
    parts = []
    for struct in structs:
        said = {**_unsaid(struct), **_docstrings(struct)}
        rows = [
            (f"`{field.encode_name}`", _kind(field.type), said.get(field.name) or _implied(field))
            for field in msgspec.structs.fields(struct)
        ]
        about = inspect.cleandoc(struct.__doc__ or "")
        fields = table("Field", "Type", "Meaning", rows=rows)
        parts.append(f"## {struct.__name__}\n\n{about}\n\n{fields}")
    sections = "\n\n".join(parts)
    return f"""# The report as JSON

`graft report MODEL` prints the report of a version, `graft report MODEL -o FILE.html` writes it as
a page, and `Client.get_report` and `GetReport` return it. It is one object of the type
[Report](#report). Fields that were not determined are null or empty. Fractions are from 0 to 1,
times in seconds, sizes in bytes.

{sections}
"""


def _structs(kind: typing.Any, seen: list[type]) -> list[type]:
    """Returns the structs that a type leads to, in the order in which they appear."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind not in seen:
            seen.append(kind)
            for field in msgspec.structs.fields(kind):
                _structs(field.type, seen)
        return seen
    for argument in typing.get_args(kind):
        _structs(argument, seen)
    return seen


def _docstrings(struct: type) -> Mapping[str, str]:
    """Returns the docstring below each field of a struct, from its source."""
    said: dict[str, str] = {}
    source = ast.parse(inspect.getsource(importlib.import_module(struct.__module__)))
    body = next(
        node.body
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    )
    for line, below in itertools.pairwise(body):
        match line, below:
            case ast.AnnAssign(), ast.Expr(ast.Constant(str(text))):
                said[ast.unparse(line.target)] = inspect.cleandoc(text)
    return said


def _unsaid(struct: type) -> dict[str, str]:
    prefix = f"{struct.__name__}."
    return {k.removeprefix(prefix): text for k, text in PLAIN.items() if k.startswith(prefix)}


def _implied(field: msgspec.structs.FieldInfo) -> str:
    """Returns the meaning of a field that its name or its type gives."""
    if field.name.endswith("_low"):
        return "Lower end of the 95 % interval."
    if field.name.endswith("_high"):
        return "Upper end of the 95 % interval."
    (struct,) = _structs(field.type, [])[:1] or [None]
    assert struct is not None, f"{field.name} has no docstring"
    return inspect.cleandoc(struct.__doc__ or "")


NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def _kind(kind: typing.Any) -> str:
    """Returns a type as JSON has it, with links to the structs."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" if value else '`""`' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin in (list, tuple, dict):
        holder = "object with values" if origin is dict else "list"
        return f"{holder} of {_kind(arguments[-1])}"
    if issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return NAMES.get(kind) or f"[{kind.__name__}](#{kind.__name__.lower()})"


PAGES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings.md": ("service/config.py", settings),
    "graft.md": ("the command's arguments", client_commands),
    "graft-server.md": ("the command's arguments", server_commands),
    "metrics.md": ("service/ops/metrics.py", metrics),
    "errors.md": ("proto/graft/v1/error_reason.proto", errors),
    "report.md": ("trainer/reporting", report),
    "grpc.md": ("proto/graft/v1 and service/auth/principal.py", grpc_contract),
}


def page(name: str) -> str:
    """Returns a page as it should be."""
    source, write = PAGES[name]
    return re.sub(r"\n{3,}", "\n\n", NOTE.format(source=source) + "\n" + write()).rstrip() + "\n"


def main() -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    if parser.parse_args().check:
        stale = [name for name in PAGES if (OUT / name).read_text("utf-8") != page(name)]
        if stale:
            sys.exit(f"stale: {', '.join(stale)}; run `make generate`")
        return
    for name in PAGES:
        (OUT / name).write_text(page(name), "utf-8")


if __name__ == "__main__":
    main()
