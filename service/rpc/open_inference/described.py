"""Models and their statistics in the protocol's messages; decides nothing."""

from service.domain import Manifest, ModelKey
from service.engine.ledger import Counts, Spent
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("classification", "model_configuration", "model_repository", "statistics")
INPUT = "images"


def metadata(model: ModelKey, manifest: Manifest, versions: list[int]) -> pb.ModelMetadataResponse:
    """Describes a version's inputs and outputs; `versions` are those that the answer is about."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[str(version) for version in versions],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1, 1])],
        outputs=[
            tensor(name="probabilities", datatype="FP32", shape=[-1, len(manifest.classes)]),
            tensor(name="labels", datatype="BYTES", shape=[-1]),
            tensor(name="features", datatype="FP32", shape=[-1, manifest.feature_dim]),
        ],
    )


def config(model: ModelKey, manifest: Manifest, max_images: int) -> pb.ModelConfig:
    """Describes a version as a Triton model configuration."""
    return pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend="onnxruntime",
        max_batch_size=max_images,
        input=[pb.ModelInput(name=INPUT, data_type=pb.TYPE_STRING, dims=[1])],
        output=[
            pb.ModelOutput(
                name="probabilities", data_type=pb.TYPE_FP32, dims=[len(manifest.classes)]
            ),
            pb.ModelOutput(name="labels", data_type=pb.TYPE_STRING),
            pb.ModelOutput(name="features", data_type=pb.TYPE_FP32, dims=[manifest.feature_dim]),
        ],
    )


def statistics(
    counts: dict[tuple[ModelKey, int], Counts], tenant: str
) -> pb.ModelStatisticsResponse:
    """Converts the counts of a tenant's models, among those of all by key and version."""
    return pb.ModelStatisticsResponse(
        model_stats=[
            pb.ModelStatistics(
                name=model.name,
                version=str(version),
                last_inference=int(of.last_s * 1e3),
                inference_count=of.images,
                execution_count=of.success.count,
                inference_stats=pb.InferStatistics(
                    success=_duration(of.success),
                    fail=_duration(of.fail),
                    queue=_duration(of.queue),
                    compute_input=_duration(of.decode),
                    compute_infer=_duration(of.infer),
                    compute_output=_duration(of.rest),
                ),
            )
            for (model, version), of in sorted(counts.items())
            if model.tenant == tenant
        ]
    )


def _duration(spent: Spent) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=spent.count, ns=int(spent.seconds * 1e9))
