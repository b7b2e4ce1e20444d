# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client's methods that classify images."""

from collections.abc import Iterable, Iterator
from contextlib import closing

from graftml_stubs.v1 import prediction_pb2 as pb

from graftml import _answers
from graftml import _sync_io as io
from graftml._channel import TRANSFER_TIMEOUT_S
from graftml._data import ImageLike
from graftml._images import model_spec, model_specs, predict_requests
from graftml._order import IMAGES_A_REQUEST, REQUESTS_UNDER_WAY, Order
from graftml._sync.transport import Transport
from graftml.errors import Unavailable
from graftml.types import Decision, ModelSpec, Prediction


class Predictions:
    """Classifies images."""

    _transport: Transport

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        model: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 1,
        include_features: bool = False,
        decision: Decision | None = None,
        timeout_s: float | None = None,
    ) -> list[Prediction]:
        """Classifies one image or many; one `Prediction` for each, in their order.

        What is too much for one call is sent in several, and `timeout_s` is for
        each. An image that the service cannot read has its error in its
        `Prediction`. `decision` says how probabilities become an answer, instead of the
        version's own.
        """
        (predictions,) = self.predict_many(
            images,
            [ModelSpec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            timeout_s=timeout_s,
        )
        return predictions

    def predict_many(
        self,
        images: ImageLike | Iterable[ImageLike],
        models: Iterable[str | ModelSpec],
        *,
        top_k: int = 1,
        include_features: bool = False,
        timeout_s: float | None = None,
    ) -> list[list[Prediction]]:
        """Classifies images with several models at once; a list for each model, as `predict`'s.

        Names mean newest versions, a `ModelSpec` any other. The service decodes an image once
        for all of them, and runs it once through each backbone that they are on: several models
        on one backbone cost about what one does.
        """
        specs = model_specs(models)
        requests = predict_requests(images, specs, top_k=top_k, include_features=include_features)
        found: list[list[Prediction]] = [[] for _ in specs]
        for request in io.stepwise(requests):
            answer = self._transport.unary(self._transport.prediction.Predict, request, timeout_s)
            for of_one, more in zip(found, _answers.predictions(answer), strict=True):
                of_one.extend(more)
        return found

    def predict_stream(
        self,
        images: Iterable[ImageLike],
        model: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 1,
        include_features: bool = False,
        decision: Decision | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Iterator[Prediction]:
        """Classifies any number of images over one stream, reading them as answers come.

        At most a few hundred images are under way. Predictions come in the
        images' order; where a whole request failed, each of its images has
        its error.
        """
        requests = predict_requests(
            images,
            [model_spec(model, version, alias, decision)],
            top_k=top_k,
            include_features=include_features,
            max_images=IMAGES_A_REQUEST,
        )
        order, room, left = Order(), io.Semaphore(REQUESTS_UNDER_WAY), io.Event()

        def messages() -> Iterator[pb.PredictStreamRequest]:
            for request in io.stepwise(requests):
                # Ends with the stream: `left` is set, and `room` made, on every way out.
                room.acquire()
                if left.is_set():
                    return
                yield order.to_send(request)

        answers = self._transport.exchange(
            self._transport.prediction.PredictStream, messages(), timeout_s
        )
        try:
            with closing(answers):
                for answer in answers:
                    for predictions in order.take(answer):
                        room.release()
                        for prediction in predictions:
                            yield prediction
        finally:
            left.set()
            room.release()
        if not order.is_complete:
            raise Unavailable(f"{self._transport.target} ended the stream before its last answer")
