"""`graft datasets`."""

import argparse
from typing import Any

from graftml import Client
from graftml.cli import _listing, _names
from graftml.cli._output import Output, Usage
from graftml.cli._watching import Watching, summary_lines
from graftml.types import Dataset, DatasetImage


def add(commands: Any) -> None:
    """The commands and their options."""
    datasets = _listing.add(
        commands,
        "datasets",
        "List, store, change and delete datasets",
        "List datasets, newest first",
        run_list,
        _listing.add_name,
    )
    datasets.add("get", "Describe one dataset", run_get).add_argument("dataset_id", metavar="ID")
    upload = datasets.add("upload", "Store a folder or an archive", run_upload)
    upload.add_argument("data", metavar="DATA", help="a folder per class, or a .tar, .tar.gz, .zip")
    upload.add_argument("--name", default="", help="a name for display")
    upload.add_argument(
        "--unlabelled",
        action="store_true",
        help="images at any depth, without classes, as the target of a domain adaptation",
    )
    upload.add_argument(
        "--case-sensitive-labels",
        action="store_true",
        help="treat class names that differ only in case as different classes",
    )
    more = datasets.add("add", "Add images to a dataset, as a new dataset", run_add)
    more.add_argument("dataset_id", metavar="ID")
    more.add_argument("data", metavar="DATA", help="a folder per class, or a .tar, .tar.gz, .zip")
    more.add_argument("--name", default="", help="a name for display")
    less = datasets.add("remove", "Remove images from a dataset, as a new dataset", run_remove)
    less.add_argument("dataset_id", metavar="ID")
    less.add_argument(
        "digests",
        metavar="DIGEST",
        nargs="+",
        help="sha256 of the image, as listed by `graft datasets images`",
    )
    less.add_argument("--name", default="", help="a name for display")
    relabel = datasets.add("relabel", "Move images to other classes, as a new dataset", run_relabel)
    relabel.add_argument("dataset_id", metavar="ID")
    relabel.add_argument(
        "labels",
        metavar="DIGEST=CLASS",
        nargs="+",
        type=_label,
        help="sha256 of the image, as listed by `graft datasets images`",
    )
    relabel.add_argument("--name", default="", help="a name for display")
    images = datasets.add("images", "List the images of a dataset", run_images)
    images.add_argument("dataset_id", metavar="ID")
    _listing.add_limits(images)
    erase = datasets.add("erase", "Erase an image from all datasets", run_erase)
    erase.add_argument(
        "digest", metavar="DIGEST", help="sha256 of the image, as listed by `graft datasets images`"
    )
    delete = datasets.add(
        "delete", "Delete a dataset, and its images that no other dataset has", run_delete
    )
    delete.add_argument("dataset_id", metavar="ID")


def _label(text: str) -> tuple[str, str]:
    digest, equals, label = text.partition("=")
    if not equals or not digest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a DIGEST=CLASS")
    return digest, label


def run_list(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists datasets."""
    prefix = _listing.given(arguments, "name", "")
    datasets = (each for each in client.list_datasets() if each.display_name.startswith(prefix))
    columns = ["dataset", "name", "images", "classes", "MiB", "created"]
    return _listing.show(datasets, columns, _row, arguments, output, kinds="datasets")


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
    if not arguments.unlabelled:
        _names.labelled(arguments.data)
    with Watching(output) as watching:
        dataset = client.upload_dataset(
            arguments.data,
            display_name=arguments.name,
            is_unlabelled=arguments.unlabelled,
            case_sensitive_labels=arguments.case_sensitive_labels,
            on_progress=watching.uploaded,
        )
    _show(dataset, output)
    return 0


def _show(dataset: Dataset, output: Output) -> None:
    if dataset.summary.left_out_count:
        for line in summary_lines(dataset.summary):
            output.warn(line)
    for warning in dataset.summary.warnings:
        output.warn(warning)
    output.thing(dataset)


def run_add(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Adds images to a dataset."""
    # Of the images of an unlabelled one no label is sent.
    dataset = client.get_dataset(arguments.dataset_id)
    with Watching(output) as watching:
        made = client.add_images(
            dataset,
            arguments.data,
            display_name=arguments.name,
            on_progress=watching.uploaded,
        )
    _show(made, output)
    return 0


def run_remove(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Leaves images out of a dataset."""
    made = client.remove_images(
        arguments.dataset_id, arguments.digests, display_name=arguments.name
    )
    output.thing(made)
    return 0


def run_relabel(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Puts images of a dataset into other classes."""
    labels = dict(arguments.labels)
    made = client.relabel_images(arguments.dataset_id, labels, display_name=arguments.name)
    output.thing(made)
    return 0


def run_images(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists the images of a dataset."""
    columns = ["digest", "class", "split", "group", "KiB", "name"]
    images = client.list_images(arguments.dataset_id)
    return _listing.show(images, columns, _image_row, arguments, output, kinds="images")


def _image_row(image: DatasetImage) -> list[object]:
    return [
        image.digest,
        image.label or None,
        image.split or None,
        image.group or None,
        None if image.is_erased else image.size_bytes / 2**10,
        "erased" if image.is_erased else image.name,
    ]


def run_erase(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Erases an image, and says what had it."""
    erased = client.erase_image(arguments.digest)
    if output.is_json:
        output.thing(erased)
        return 0
    output.line(f"erased {arguments.digest} from {', '.join(erased.dataset_ids)}")
    for version in erased.versions:
        output.line(f"{version.model}:{version.version} was trained or measured on it")
    return 0


def run_delete(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Deletes a dataset."""
    client.delete_dataset(arguments.dataset_id)
    return output.deleted(arguments.dataset_id)
