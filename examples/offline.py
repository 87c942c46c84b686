"""Images without a server, in this process.

    python examples/offline.py [MODEL] [PROMPT]

MODEL is a folder or a repo id; by default the released Turbo.
"""

import sys

from krea2_srt import Krea2

name = sys.argv[1] if len(sys.argv) > 1 else "krea/Krea-2-Turbo"
prompt = sys.argv[2] if len(sys.argv) > 2 else "a red fox sitting in fresh snow, golden hour"
model = Krea2.load(name)
for number, image in enumerate(model.generate(prompt, seed=7, num_images=2)):
    file = f"image_{number}.png"
    image.save(file)
    print(file)
