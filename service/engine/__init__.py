"""Inference: images in, probabilities out. Knows no RPC, no jobs, no database.

ONNX Runtime and OpenVINO would report each start to their makers, from a process that holds
customers' images. Both are kept from it here, before either is imported, which happens only
through this package.
"""

import os
import sys
from types import ModuleType

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# It has no switch, but does without a package that is not there; this one is empty.
sys.modules.setdefault("openvino_telemetry", ModuleType("openvino_telemetry"))
