"""The 8-bit formats that are compared, by the names that configurations have for them."""

from krea2_srt.model.quantization import Quantization

SIDE_BY_SIDE = {"int8": Quantization("int8", rotation=True), "fp8": Quantization("fp8")}
"""What is compared where nobody says what."""

FORMATS = {**SIDE_BY_SIDE, "int8_unrotated": Quantization("int8")}
