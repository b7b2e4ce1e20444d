"""`graft backbones`."""

import argparse
from typing import Any

from graftml import Client
from graftml.cli import _listing
from graftml.cli._output import Output
from graftml.cli._watching import Watching
from graftml.types import Backbone


def add(commands: Any) -> None:
    """The commands and their options."""
    backbones = _listing.add(
        commands,
        "backbones",
        "List, register and delete backbones",
        "List backbones by name",
        run_list,
    )
    register = backbones.add("register", "Register an ONNX file as a backbone", run_register)
    register.add_argument("file", metavar="FILE", help="an .onnx file that contains its weights")
    register.add_argument("--name", required=True, help="name of the backbone, used as onnx/NAME")
    register.add_argument(
        "--size", type=int, required=True, metavar="N", help="side of its input images in pixels"
    )
    for option, what in (("--mean", "mean to subtract"), ("--std", "deviation to divide by")):
        register.add_argument(
            option,
            type=float,
            nargs=3,
            required=True,
            metavar=("R", "G", "B"),
            help=f"{what}, for values from 0 to 1",
        )
    register.add_argument(
        "--layout", choices=("nchw", "nhwc"), default="nchw", help="order of its input's axes"
    )
    register.add_argument(
        "--output", default="", metavar="VALUE", help="value of the graph that holds the features"
    )
    register.add_argument("--licence", default="", metavar="TEXT", help="licence of its weights")
    register.add_argument(
        "--sha256", default="", metavar="HEX", help="digest to check the file against"
    )
    delete = backbones.add("delete", "Delete a registered backbone", run_delete)
    delete.add_argument("name", metavar="NAME")


def run_list(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists backbones."""
    columns = ["backbone", "source", "size", "features", "MiB", "registered", "licence"]
    backbones = client.list_backbones()
    return _listing.show(
        backbones, columns, _row, arguments, output, kinds="backbones", is_prose=True
    )


def _row(backbone: Backbone) -> list[object]:
    return [
        backbone.name,
        backbone.source,
        backbone.size or None,
        backbone.feature_dim or None,
        backbone.size_bytes / 2**20 if backbone.size_bytes else None,
        backbone.create_time,
        backbone.licence or None,
    ]


def run_register(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Registers a file."""
    with Watching(output, checks="the server checks the file") as watching:
        backbone = client.register_backbone(
            arguments.file,
            arguments.name,
            size=arguments.size,
            mean=arguments.mean,
            std=arguments.std,
            layout=arguments.layout,
            output=arguments.output,
            licence=arguments.licence,
            sha256=arguments.sha256,
            on_progress=watching.uploaded,
        )
    output.thing(backbone)
    return 0


def run_delete(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Deletes a registered backbone."""
    client.delete_backbone(arguments.name)
    return output.deleted(arguments.name)
