"""One image with previews of it on its way, as server-sent events: pip install openai.

python examples/stream.py "a red fox in fresh snow"
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red heart on a yellow background"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:30000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
stream = client.images.generate(prompt=prompt, stream=True, partial_images=2)
for event in stream:
    if event.type == "image_generation.partial_image":
        file = Path(f"preview_{event.partial_image_index}.png")
    elif event.type == "image_generation.completed":
        file = Path("image.png")
    else:
        continue
    file.write_bytes(base64.b64decode(event.b64_json))
    print(file)
