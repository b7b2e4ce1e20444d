"""The model that is measured: fine-tuned on a few photos, and its exported file."""

from pathlib import Path

from graft import Client

NAME = "bench"


def fine_tune(client: Client, folder: Path, backbone: str) -> None:
    """Makes the model `bench`; ResNets start from random weights, which cost the same."""
    pairs = []
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        pairs += [(label.name, photo) for photo in sorted(label.rglob("*.jpg"))[:6]]
    weights = "" if backbone == "efficientnet_lite0" else "random"
    client.fine_tune(pairs, name=NAME, backbone=backbone, weights=weights).wait(timeout_s=300)
