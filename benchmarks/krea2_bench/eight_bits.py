"""The 8-bit formats that are compared: those that are served, each with and without a rotation."""

from dataclasses import replace

from krea2_srt.model.quantization import SERVED

FORMATS = {
    each.name: each
    for served in SERVED.values()
    for each in (served, replace(served, rotation=not served.rotation))
}
"""By the names that configurations and tables have for them."""
