"""The 8-bit formats that are compared, by the names that configurations have for them."""

from krea2_srt.model.quantization import SERVED, Quantization

FORMATS = {**SERVED, "int8_unrotated": Quantization("int8")}
