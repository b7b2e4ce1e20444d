"""Ten mistakes of newcomers at the command line, and what each is told, by a real server."""

import asyncio
from pathlib import Path

import pytest
from graftml.cli import main

from tests.rpc.conftest import MakeService, Service, image

MISTAKES = {
    "a command is mistyped": (
        "fintune photos --name colours",
        2,
        "argument COMMAND: there is no 'fintune'; did you mean finetune? (see graft --help)",
    ),
    "an option is mistyped": (
        "finetune photos --nme colours",
        2,
        "'--nme' is not an argument of this command; did you mean --name? (see graft finetune "
        "--help)",
    ),
    "the model's name has capitals and a space": (
        "finetune photos --name My~Model",
        1,
        "model 'My Model' is not a name: use 1 to 63 lower-case letters, digits, '-', '_' and '.', "
        "beginning with a letter or digit [INVALID_FIELD]",
    ),
    "an option is another method's": (
        "finetune photos --name colours --epochs 3",
        2,
        "epochs is a hyperparameter of model_based and domain_adaptation, not of auto: set "
        "--method model-based or --method domain-adaptation, or leave epochs out (see --method)",
    ),
    "the folder has one class": (
        "finetune one --name colours",
        1,
        "the images are of 1 class ('red'), and 2 are needed to tell apart: add images of another "
        "class, or go on from a version that has some [DATASET_UNUSABLE]",
    ),
    "the model's name is mistyped": (
        "predict color photos",
        1,
        "no model is called 'color': did you mean colours? [MODEL_NOT_FOUND]",
    ),
    "the image comes before the model": (
        "predict photos/red/0.png colours",
        2,
        "photos/red/0.png is a file: write the model before the images",
    ),
    "the image is a URL": (
        "predict colours https://example.org/a.jpg",
        2,
        "https://example.org/a.jpg is not fetched: fetch it first, such as with curl, and name the "
        "file or -",
    ),
    "the folder is one of a class": (
        "finetune photos/red --name colours",
        2,
        "photos/red has no folders in it: name the folder that has a folder of images for each "
        "class",
    ),
    "a model is deleted by a script": (
        "models delete colours",
        2,
        "colours with 1 version would be deleted, and there is no way back: say so with --yes",
    ),
}
"""What was typed (~ is a space within a word), the exit code, and the line on standard error."""


@pytest.fixture
async def asked(
    make_service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Service:
    """A server with the model `colours`; the current folder has images of it."""
    monkeypatch.chdir(tmp_path)
    for folder, labels in (("photos", ("red", "green")), ("one", ("red",))):
        for label in labels:
            (tmp_path / folder / label).mkdir(parents=True)
            for number in range(3):
                data = image(label, (64 + number, 48))
                (tmp_path / folder / label / f"{number}.png").write_bytes(data)
    service = await make_service()
    await service.make_model()
    return service


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_is_answered_in_one_line_that_says_what_to_do(
    asked: Service, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    typed, code, told = MISTAKES[mistake]
    words = [word.replace("~", " ") for word in typed.split()]
    server = f"127.0.0.1:{asked.app.port}"
    capsys.readouterr()
    assert await asyncio.to_thread(main, [*words, "--server", server]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"graft: {told}\n")
