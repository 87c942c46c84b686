"""A picture for exchanges that are not about pictures."""

import numpy as np

from krea2_srt.images import encode_image

SMALL = encode_image(np.full((16, 16, 3), 200, np.uint8), "png", 100)
