"""Which images belong together, over the wire."""

from pathlib import Path

from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import Auto, Grouping
from service.ingest import index
from tests.rpc.conftest import Service, colours


async def test_which_images_belong_together_reaches_the_trainer(service: Service) -> None:
    images = colours()
    images.images[0].group = "one recording"
    asked = pb.FineTuneRequest(
        model="colours",
        inline_images=images,
        grouping=pb.Grouping(name_pattern="{group}_*.png"),
    )
    started = await service.fine_tuning.FineTune(asked)
    assert started.job.request.grouping == asked.grouping
    assert started.job.request.WhichOneof("method") is None
    await service.ended(started.job.job_id)
    spec = service.launcher.trainers[0].spec
    assert spec.grouping == Grouping(name_pattern="{group}_*.png")
    assert spec.method == Auto()
    groups = [image.group for image in index.load(Path(spec.files[spec.data.index])).images]
    assert sorted(filter(None, groups)) == ["one recording"]
