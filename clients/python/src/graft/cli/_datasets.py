"""`graft datasets`."""

import argparse
from typing import Any

from graft.cli._output import Output, Usage, warn
from graft.cli._watching import Watching, summary_lines
from graft.client import Client
from graft.types import Dataset


def add(commands: Any) -> None:
    """The commands and their options."""
    datasets = commands.group("datasets", "Keep images on the server", run_list)
    datasets.add("list", "Datasets, newest first", run_list)
    datasets.add("get", "Describe one dataset", run_get).add_argument("dataset_id", metavar="ID")
    upload = datasets.add("upload", "Store a folder or an archive", run_upload)
    upload.add_argument("data", metavar="DATA", help="a folder per class, or a .tar, .tar.gz, .zip")
    upload.add_argument("--name", default="", help="a name for people")
    upload.add_argument(
        "--unlabelled",
        action="store_true",
        help="images at any depth, without classes: the target of a domain adaptation",
    )
    upload.add_argument(
        "--case-sensitive-labels",
        action="store_true",
        help="class names that differ in upper and lower case alone are two classes",
    )
    delete = datasets.add("delete", "Delete a dataset and its images", run_delete)
    delete.add_argument("dataset_id", metavar="ID")


def run_list(client: Client, _arguments: argparse.Namespace, output: Output) -> int:
    """Lists datasets."""
    columns = ["dataset", "name", "images", "classes", "MiB", "created"]
    output.items(client.list_datasets(), columns, _row)
    return 0


def _row(dataset: Dataset) -> list[object]:
    return [
        dataset.dataset_id,
        dataset.display_name or None,
        dataset.image_count,
        "unlabelled" if dataset.is_unlabelled else len(dataset.classes),
        dataset.size_bytes / 2**20,
        dataset.create_time,
    ]


def run_get(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Describes one dataset."""
    output.thing(client.get_dataset(arguments.dataset_id))
    return 0


def run_upload(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Stores a dataset."""
    if arguments.data.startswith("server:"):
        raise Usage(
            f"{arguments.data} lies on the server already, and is not uploaded: give it to "
            "`graft finetune` directly"
        )
    with Watching(output) as watching:
        dataset = client.upload_dataset(
            arguments.data,
            display_name=arguments.name,
            is_unlabelled=arguments.unlabelled,
            case_sensitive_labels=arguments.case_sensitive_labels,
            on_progress=watching.uploaded,
        )
    if dataset.summary.left_out_count:
        for line in summary_lines(dataset.summary):
            warn(line)
    for warning in dataset.summary.warnings:
        warn(warning)
    output.thing(dataset)
    return 0


def run_delete(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Deletes a dataset."""
    client.delete_dataset(arguments.dataset_id)
    if output.is_json:
        output.emit({"deleted": arguments.dataset_id})
    else:
        output.line(f"deleted {arguments.dataset_id}")
    return 0
