"""What a trainer that waits does before it knows its job: the imports, which take seconds.

Nothing is computed that a job could find changed, and no GPU is touched: the
memory of one belongs to the jobs that run.
"""

import importlib
import warnings

_MODULES = (
    "torch",
    "timm",
    "scipy.optimize",
    "trainer.train",
    "trainer.backbones",
    "trainer.export",
    "trainer.methods.model_based",
    "trainer.outliers",
    "trainer.gate",
)
_OPTIONAL = ("openvino", "onnxruntime_ep_openvino")


def prepare() -> None:
    """Imports all that a usual job needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(name)
        for name in _OPTIONAL:
            try:
                importlib.import_module(name)
            except ImportError:
                continue
    from trainer.reporting import page

    page.template()
