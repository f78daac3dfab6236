"""Prints the path of the emulator's library: FA_SM120_DRIVER=$(python tests/emulator) pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from emulator import library

print(library())
