"""Puts the answers of a prediction stream back into their requests' order. Pure.

Each request asks one model.

What waits here for an earlier answer is bounded by how many requests the
transports let be under way.
"""

from graftml_stubs.v1 import prediction_pb2 as pb

from graftml import _answers, types
from graftml.errors import from_status

IMAGES_A_REQUEST = 32
REQUESTS_UNDER_WAY = 8


class Order:
    """The requests of one stream that are not handed on yet."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[str, int]] = {}
        self._answered: dict[int, list[types.Prediction]] = {}
        self._next_sent = 0
        self._next_out = 0

    def to_send(self, request: pb.PredictRequest) -> pb.PredictStreamRequest:
        """The request with a name that its answer will carry."""
        number = self._next_sent
        self._next_sent += 1
        self._sent[number] = (request.models[0].model, len(request.images))
        return pb.PredictStreamRequest(id=str(number), request=request)

    def take(self, answer: pb.PredictStreamResponse) -> list[list[types.Prediction]]:
        """Notes an answer; returns what can be handed on now, a list for each request.

        Where a whole request failed, each of its images has its error.
        """
        number = int(answer.id)
        model, count = self._sent.pop(number)
        if answer.WhichOneof("outcome") == "response":
            (self._answered[number],) = _answers.predictions(answer.response)
        else:
            error = from_status(answer.error)
            self._answered[number] = [types.Prediction(model, None, error=error)] * count
        ready = []
        while self._next_out in self._answered:
            ready.append(self._answered.pop(self._next_out))
            self._next_out += 1
        return ready

    @property
    def is_complete(self) -> bool:
        """Whether all that was sent was answered."""
        return not self._sent
