"""Put before the real trainer on a server's PYTHONPATH: its records, another `__main__`."""

import os
from pathlib import Path

__path__.append(str(Path(os.environ["STAND_IN_ROOT"]) / "trainer"))
