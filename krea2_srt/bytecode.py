"""Bytecode is kept, also where PYTHONDONTWRITEBYTECODE is set, as in many images and CI machines.

Without it every process compiles the thousands of modules of SGLang and torch anew: half a minute.
"""

import os
import sys


def write_bytecode() -> None:
    """For this process and those that it starts; what it cannot write to, Python passes over."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
