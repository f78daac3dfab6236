"""Prints the path of the emulator's library: FA_SM120_DRIVER=$(python -m emulator) pytest."""

from . import library

print(library())
