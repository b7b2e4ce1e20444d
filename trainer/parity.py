"""The proof that what serves answers as it should, in two parts.

The backbone: under the job's own head, features of what serves against those of a reference, which
were made another way. A shared backbone has PyTorch's beside its file (`trainer.reference`), so
that no job needs torch for it; one that was trained is compared with its network, on the job's
images; a registered one has no network, and is compared with what ONNX Runtime's CPU provider
makes of it. The head: what its file answers, against what the trainer fitted.
"""

from pathlib import Path

import numpy as np

from service.domain import Parity
from service.engine import head as heads
from service.engine.head import Floats, Head
from service.errors import Internal, Reason

MAX_DIFFERENCE = 1e-3
"""Of a probability, between a reference and what serves."""
IMAGES = 32
"""Of the job's own that a trained network is compared on."""
PLAIN_IMAGES = 8
"""Of the job's own that a registered file is compared on, which was checked when it came."""
_MAX_HEAD_DIFFERENCE = 1e-6
"""Of a probability, between a head and its file: both compute the same sums."""


def compare(head: Head, served: Floats, wanted: Floats, title: str) -> Parity:
    """Compares the head's answers on features [n, d] of what serves and of `title`.

    Raises Internal (PARITY_FAILED) when a probability differs by more than 1e-3.
    """
    answers, wanted = head.probabilities(served), head.probabilities(wanted)
    difference = float(np.abs(answers - wanted).max())
    agreement = float((answers.argmax(axis=1) == wanted.argmax(axis=1)).mean())
    # Written so that NaN fails too.
    if not difference <= MAX_DIFFERENCE:
        raise Internal(
            Reason.PARITY_FAILED,
            f"the exported model differs from {title} by {difference:.2g} in a probability (at "
            f"most {MAX_DIFFERENCE:g} is allowed; {agreement:.0%} of the best classes agree) on "
            f"{len(served)} images: it was not published",
        )
    return Parity(difference, agreement, len(served))


def check_head(file: Path, head: Head, features: Floats) -> None:
    """Checks that a head's file answers on features [n, d] as the head that was measured.

    Raises Internal (PARITY_FAILED), and as `heads.load` for a file that is none.
    """
    kept = heads.load(file.read_bytes())
    named = kept.classes == head.classes
    answers, wanted = kept.probabilities(features), head.probabilities(features)
    if named and np.array_equal(kept.decide(answers), head.decide(wanted)):
        difference = float(np.abs(answers - wanted).max(initial=0.0))
        if difference <= _MAX_HEAD_DIFFERENCE:
            return
    raise Internal(
        Reason.PARITY_FAILED,
        f"the head's file answers otherwise than the head that was fitted and measured, on "
        f"{len(features)} images: it was not published",
    )
