"""Files that were put where ours should be: none of them is run."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.backbones import BACKBONES
from service.errors import WrongState
from tests.architecture.test_outside_data import Evil
from tests.trainer.conftest import Told
from trainer import backbones
from trainer.checkpoint import FILE, Checkpoints

NAME = "IMAGENET1K_V1"


@pytest.mark.parametrize("way", ["torch", "pickle", "junk"])
def test_a_checkpoint_that_would_run_code_is_passed_over(
    tmp_path: Path, told: Told, way: str
) -> None:
    proof, path = tmp_path / "ran", tmp_path / FILE
    if way == "torch":
        torch.save({"key": "own", "state": Evil(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(proof), 2) if way == "pickle" else b"PK\3\4junk")
    assert Checkpoints(str(tmp_path), "own").load(told.append) is None
    assert not proof.exists()
    assert len(told) == 1


def test_weights_in_a_mirror_that_would_run_code_are_refused_by_their_hash(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save({"fc.weight": Evil(proof)}, path)
    with pytest.raises(WrongState, match="sha256"):
        backbones.load("resnet18", NAME, 0, tmp_path)
    assert not proof.exists()


def test_weights_that_would_run_code_are_not_run_even_where_the_hash_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "ran"
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save({"fc.weight": Evil(proof)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    row = replace(BACKBONES["resnet18"], weights={NAME: f"resnet18-{digest[:8]}.pth"})
    monkeypatch.setitem(BACKBONES, "resnet18", row)
    path.rename(tmp_path / row.weights[NAME])
    with pytest.raises(WrongState, match="UnpicklingError"):
        backbones.load("resnet18", NAME, 0, tmp_path)
    assert not proof.exists()
