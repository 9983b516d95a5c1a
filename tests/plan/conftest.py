"""Lets these tests import the machines that do not exist, of the security tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "security"))
