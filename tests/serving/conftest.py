"""Lets these tests import what they share, and the machines and samples of the security tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "security")]
