"""Model-based transfer: training starts from the pretrained weights and goes on.

The modern recipe begins with the fitted head, then trains all layers, early ones
least, and keeps the moving average of the weights. The classic one is the yardstick
that users know.
"""

from collections.abc import Callable

from service.inference.head import Head
from service.jobs.contract import JobSpec, ModelBased
from trainer import checkpoint
from trainer.backbones import Backbone
from trainer.data import Part
from trainer.methods import loop
from trainer.methods.loop import Objective
from trainer.recipes import settings
from trainer.records import Send


def train(
    spec: JobSpec,
    method: ModelBased,
    learned: Part,
    held_out: Part,
    classes: tuple[str, ...],
    backbone: Backbone,
    first_head: Callable[[], Head],
    deadline: float | None,
    send: Send,
) -> loop.Result:
    """Trains the backbone in place, from the images of `learned` alone.

    `held_out` may be empty: it is measured after each epoch, and chooses nothing.
    `first_head` fits a feature-based head, where the recipe begins with one.
    `deadline` is a `time.monotonic()`; epochs are planned to end before it. Goes
    on from what lies in `spec.checkpoint_dir`, where that is of the same work.
    Raises GraftError with TRAINING_FAILED when the loss is no number any more.
    """
    recipe = settings(method, is_pretrained=spec.weights != "random")
    work = loop.Work(
        spec=spec,
        recipe=recipe,
        classes=classes,
        learned=learned,
        held_out=held_out,
        backbone=backbone,
        first_head=first_head,
        objective=Objective(recipe.label_smoothing),
        key=checkpoint.key(spec, method, learned),
    )
    return loop.run(work, deadline, send)
