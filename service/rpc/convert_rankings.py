"""Between rankings of backbones and the contract's messages; decides nothing."""

from graft.v1 import fine_tuning_pb2 as pb

from service.contract import BackbonesRanked, PretrainedBackbone
from service.jobs.request import RankRequest


def request(
    message: pb.RankBackbonesRequest, tenant: str, *, server_path: str, dataset_id: str
) -> RankRequest:
    """What was asked; the images are where the caller put them."""
    return RankRequest(
        tenant=tenant,
        server_path=server_path,
        dataset_id=dataset_id,
        backbones=[
            PretrainedBackbone(backbone=c.backbone, weights=c.weights) for c in message.backbones
        ],
        time_budget_s=(
            message.time_budget.ToMicroseconds() / 1e6 if message.HasField("time_budget") else None
        ),
        seed=message.seed if message.HasField("seed") else None,
        case_sensitive_labels=message.case_sensitive_labels,
    )


def response(ranked: BackbonesRanked) -> pb.RankBackbonesResponse:
    """A ranking."""
    return pb.RankBackbonesResponse(
        backbones=[
            pb.RankedBackbone(
                backbone=row.backbone,
                weights=row.weights,
                weights_licence=row.weights_licence,
                log_loss=row.log_loss,
                log_me=row.log_me,
                image_ms=row.image_ms,
                feature_dim=row.feature_dim,
                problem=row.problem,
            )
            for row in ranked.ranking
        ],
        explanation=ranked.explanation,
        image_count=ranked.images,
    )
