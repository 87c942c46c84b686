"""Imported before anything else that imports Triton: it decides then whether its kernels, and the
functions of its own library, run in its interpreter. They do, in the process of the tests.
"""

import importlib
import os
import pkgutil

os.environ["TRITON_INTERPRET"] = "1"

import krea2_srt.kernels

for _module in pkgutil.iter_modules(krea2_srt.kernels.__path__, "krea2_srt.kernels."):
    importlib.import_module(_module.name)

del os.environ["TRITON_INTERPRET"]  # not for the servers that tests start
