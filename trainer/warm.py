"""What a trainer that waits does before it knows its job: the imports of a feature-based one.

Not PyTorch's, which takes seconds and most of the memory that a waiting trainer would hold: jobs
that train a network, or export one that is not known yet, import it themselves, and take much
longer than that. Nothing is computed that a job could find changed, and no GPU is touched: the
memory of one belongs to the jobs that run.
"""

import importlib
from contextlib import suppress

_MODULES = (
    "trainer.train",
    "trainer.baselines",
    "trainer.crops",
    "trainer.methods.auto",
    "trainer.ranking",
)


def prepare() -> None:
    """Imports all that a feature-based job needs."""
    for name in _MODULES:
        importlib.import_module(name)
    with suppress(ImportError):  # an optional extra
        importlib.import_module("openvino")
    from threadpoolctl import ThreadpoolController

    from trainer.reporting import page

    page.template()
    # Finds BLAS, which takes a thirtieth of a second the first time.
    ThreadpoolController()
