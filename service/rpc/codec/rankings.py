"""Rankings of backbones as messages."""

from graft.v1 import fine_tuning_pb2 as pb

from service.contract import BackbonesRanked


def response(ranked: BackbonesRanked) -> pb.RankBackbonesResponse:
    """Converts a ranking."""
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
