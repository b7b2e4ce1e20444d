"""Small coloured images of two classes, enough for a job of seconds."""

import io

from PIL import Image


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


IMAGES = [
    (label, png((250 - i, i, 20) if label == "red" else (i, 20, 250 - i)))
    for label in ("red", "blue")
    for i in range(12)
]

QUICK = {"backbone": "resnet18", "weights": "random", "seed": 1}
"""What makes a job quick: a small backbone that nothing is fetched for."""
