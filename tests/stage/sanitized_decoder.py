"""A pytest plugin: the native decoder is the library that the environment's DECODER names."""

import os
from pathlib import Path

from runtime.stage.native import library

library._PATH = Path(os.environ["DECODER"])
