"""`graft models`, `graft rollback`, `graft promote`, `graft report` and `graft export`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from graftml import Client
from graftml._files import whole_file
from graftml.cli import _listing, _names
from graftml.cli._output import Output, Usage
from graftml.types import Model, Version


def add(commands: Any) -> None:
    """The commands and their options."""
    models = _listing.add(
        commands,
        "models",
        "List, describe and delete models, versions and aliases",
        "List models by name",
        run_list,
        _listing.add_name,
        _listing.add_labels,
    )
    get = models.add("get", "Describe a model or one of its versions", run_get)
    get.add_argument("model", metavar="MODEL", help="MODEL, MODEL@ALIAS or MODEL:VERSION")
    versions = models.add("versions", "List a model's versions, newest first", run_versions)
    versions.add_argument("model", metavar="MODEL")
    _listing.add_labels(versions)
    _listing.add_limits(versions)
    delete = models.add("delete", "Delete a model, or one version of it", run_delete)
    delete.add_argument("model", metavar="MODEL[:VERSION]")
    delete.add_argument(
        "--yes", "-y", action="store_true", help="do not ask before deleting a whole model"
    )
    delete.add_argument(
        "--force",
        action="store_true",
        help="delete a model even if aliases other than latest point to it; does not ask",
    )
    alias = models.add("alias", "Point an alias to a version, or remove it", run_alias)
    alias.add_argument("model", metavar="MODEL")
    alias.add_argument("alias", metavar="ALIAS")
    alias.add_argument("version", metavar="VERSION", nargs="?")
    alias.add_argument("--delete", action="store_true", help="remove the alias")

    rollback = commands.add("rollback", "Point an alias back to its previous version", run_rollback)
    rollback.add_argument("model", metavar="MODEL")
    rollback.add_argument("alias", metavar="ALIAS", nargs="?", default="latest")
    promote = commands.add(
        "promote", "Publish a candidate although it did not pass its gate", run_promote
    )
    promote.add_argument("model", metavar="MODEL")
    promote.add_argument("version", metavar="VERSION")

    report = commands.add("report", "Write a version's report", run_report)
    report.add_argument("model", metavar="MODEL", help=_names.HELP)
    report.add_argument(
        "--html", action="store_true", help="an HTML page instead of JSON; implied by FILE.html"
    )
    report.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    export = commands.add("export", "Write a model as one self-contained ONNX file", run_export)
    export.add_argument("model", metavar="MODEL", help=_names.HELP)
    export.add_argument("-o", "--output", metavar="FILE", required=True)


def run_list(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists models."""
    models = client.list_models(
        name_prefix=_listing.given(arguments, "name", ""),
        labels=dict(_listing.given(arguments, "label", [])),
    )
    columns = ["model", "versions", "aliases", "updated"]
    return _listing.show(models, columns, _model_row, arguments, output, kinds="models")


def _model_row(model: Model) -> list[object]:
    aliases = ", ".join(f"{alias} = {number}" for alias, number in sorted(model.aliases.items()))
    return [model.name, model.version_count, aliases, model.update_time]


def run_get(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Describes a model or a version."""
    model, which = _names.parse(arguments.model)
    if model != arguments.model:
        output.thing(client.get_version(model, **which), without=["manifest"])
        return 0
    found = client.get_model(model)
    if output.is_json or "latest" not in found.aliases:
        output.thing(found)
        return 0
    latest = client.get_version(model)
    output.thing(found, ("classes", ", ".join(latest.classes)), ("accuracy", latest.measured))
    return 0


def run_versions(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists a model's versions."""
    labels: dict[str, str] = dict(_listing.given(arguments, "label", []))
    versions = (
        version
        for version in client.list_versions(arguments.model)
        if labels.items() <= version.labels.items()
    )
    columns = ["version", "aliases", "method", "backbone", "created", "job", "accuracy"]
    return _listing.show(
        versions, columns, _version_row, arguments, output, kinds="versions", is_prose=True
    )


def _version_row(version: Version) -> list[object]:
    return [
        version.version,
        ", ".join([*version.aliases, *_marks(version)]) or None,
        version.method.replace("_", "-"),
        version.backbone,
        version.create_time,
        version.job_id,
        version.measured,
    ]


def _marks(version: Version) -> list[str]:
    return ["candidate"] if version.is_candidate else []


def run_delete(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Deletes a model or a version."""
    model, which = _names.parse(arguments.model)
    if which["alias"] is not None:
        raise Usage("name what to delete as MODEL or MODEL:VERSION, not by an alias")
    if which["version"] is None:
        if not (arguments.yes or arguments.force):
            _confirm(client.get_model(model), output)
        client.delete_model(model, force=arguments.force)
    elif arguments.force:
        raise Usage("--force is for a whole model: of a version, delete or move its aliases first")
    else:
        client.delete_version(model, which["version"])
    return output.deleted(arguments.model)


def _confirm(model: Model, output: Output) -> None:
    """Raises Usage unless somebody at a terminal says yes."""
    versions = "1 version" if model.version_count == 1 else f"{model.version_count} versions"
    what = f"{model.name} with {versions}"
    if output.is_json or not sys.stdin.isatty():
        raise Usage(f"{what} would be deleted, and there is no way back: say so with --yes")
    print(f"Delete {what}? There is no way back [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Usage(f"{model.name} was not deleted")


def run_alias(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Moves or removes an alias."""
    if arguments.delete == (arguments.version is not None):
        raise Usage("give either the VERSION that the alias shall point to, or --delete")
    if arguments.delete:
        model = client.delete_alias(arguments.model, arguments.alias)
    else:
        version = _names.version(arguments.version)
        model = client.set_alias(arguments.model, arguments.alias, version)
    output.thing(model)
    return 0


def run_rollback(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Rolls an alias back."""
    back = client.rollback_alias(arguments.model, arguments.alias)
    if output.is_json:
        output.emit(back)
    else:
        output.line(
            f"{arguments.model}@{arguments.alias} is version {back.to_version} again; it was "
            f"{back.from_version}"
        )
    return 0


def run_promote(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Publishes a candidate."""
    output.thing(client.promote_version(arguments.model, _names.version(arguments.version)))
    return 0


def run_report(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Writes a report."""
    model, which = _names.parse(arguments.model)
    ending = Path(arguments.output or "").suffix.lower()
    if ending not in ("", ".html", ".json") and not (arguments.html or arguments.json):
        raise Usage(f"a report is HTML or JSON: end {arguments.output} with .html or .json")
    if arguments.html or ending == ".html":
        text = client.get_report_html(model, **which)
    else:
        report = client.get_report(model, **which)
        text = json.dumps(report, indent=None if output.is_json else 2) + "\n"
    if arguments.output is None:
        output.document(text)
    else:
        with whole_file(Path(arguments.output)) as file:
            file.write(text.encode())
        _wrote(Path(arguments.output), output)
    return 0


def run_export(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Writes a model's file."""
    model, which = _names.parse(arguments.model)
    _wrote(client.export_model(model, arguments.output, **which), output)
    return 0


def _wrote(path: Path, output: Output) -> None:
    size = path.stat().st_size
    if output.is_json:
        output.emit({"path": str(path), "size_bytes": size})
    else:
        output.line(f"{path}: {size / 2**20:.2f} MiB")
