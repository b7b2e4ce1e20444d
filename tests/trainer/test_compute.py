"""What training computes on, and in batches of which size."""

import pytest
import torch

from service.contract import ModelBased, Note
from service.errors import WrongState
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.test_model_based import Trained
from tests.trainer.test_uploads import FakeLink
from trainer import compute, device_views
from trainer.device_views import DeviceViews
from trainer.methods import model_based
from trainer.recipes import batch_sizes_for

SIZES = [16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize(
    ("images", "device", "expected"),
    [
        (100_000, "cpu", [64]),
        (397, "cuda", [16]),
        # An epoch keeps a hundred steps.
        (9_999, "cuda", [32, 64]),
        (51_200, "cuda", [64, 128, 256, 512]),
        (10_000_000, "cuda", [256, 512]),
    ],
)
def test_on_a_gpu_batches_may_grow_as_far_as_an_epoch_keeps_its_steps(
    images: int, device: str, expected: list[int]
) -> None:
    assert batch_sizes_for(images, device) == expected


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [
        # A step costs the same whatever it holds: the GPU is far from full.
        (lambda _: 0.01, 512),
        # A step costs 10 ms, and each image on top: the dearer these, the sooner it is full.
        (lambda size: 0.01 + 0.0001 * size, 512),
        (lambda size: 0.01 + 0.001 * size, 64),
        # Full from the start.
        (lambda size: 0.001 * size, 16),
    ],
)
def test_the_largest_batch_that_pays_is_taken(step_s: compute.Callable, expected: int) -> None:
    assert compute.largest_batch(SIZES, step_s) == expected


def test_a_batch_for_which_there_is_no_memory_ends_the_search() -> None:
    def step_s(size: int) -> float:
        if size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.01

    assert compute.largest_batch(SIZES, step_s) == 64
    with pytest.raises(ZeroDivisionError):
        compute.largest_batch(SIZES, lambda _: 1 / 0)


def test_training_takes_the_measured_batch_and_says_so(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_based, "batch_sizes_for", lambda _images, _device: [2, 4, 8])
    # A step on eight takes twice as long as one on four.
    monkeypatch.setattr(compute, "step_s", lambda _p, _d, _n, batch: max(4, len(batch)) / 100)
    method = ModelBased(epochs=1, precision="fp32")
    used = Trained(make_folder(per_class=8), make_spec, method, told).run().hyperparameters
    assert used["batch_size"] == 4
    assert "batches have 4 images" in [n.text for n in told.of(Note) if isinstance(n, Note)]
    assert "gpu" not in used


def test_batches_come_to_a_device_by_its_link_and_views_are_made_there(
    make_folder: MakeFolder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(per_class=8, side=256)
    method = ModelBased(epochs=2, batch_size=4, precision="fp32")
    losses = []
    links: list[FakeLink] = []

    def link_to(_device: torch.device) -> FakeLink:
        links.append(FakeLink())
        return links[-1]

    for is_device in (False, True):
        if is_device:
            monkeypatch.setattr(model_based, "link_to", link_to)
            monkeypatch.setattr(
                device_views, "make", lambda _d, _v, s: DeviceViews(torch.device("cpu"), s, 2**20)
            )
        job = Trained(folder, make_spec, method, Told())
        job.run()
        losses.append([epoch.train_loss for epoch in job.epochs])
    assert links[0].allocated
    # Other pixels at the edges of views are all the difference.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_gpu_computes_fp32_in_32_bits_and_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    was = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        device = compute.choose_device("auto")
        assert device.type == "cuda"
        assert compute.describe(device) == {"gpu": "a GPU", "tf32": False, "cudnn_benchmark": True}
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = was
    assert compute.describe(torch.device("cpu")) == {}


def test_the_cpu_is_taken_when_asked_for_and_cuda_never_stood_in_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compute.choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.choose_device("auto").type == "cpu"
    with pytest.raises(WrongState, match="auto or cpu"):
        compute.choose_device("cuda")
