"""Two images with OpenAI's own client: pip install openai.

    python examples/openai_client.py "a red fox in fresh snow"

OPENAI_BASE_URL and OPENAI_API_KEY say which server, as everywhere; by default the one that
`make serve` starts.
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
response = client.images.generate(
    prompt=prompt,
    n=2,
    output_format="png",
    # What OpenAI's API has no name for goes into extra_body: docs/server.md has the list.
    extra_body={"seed": 7},
)
for number, image in enumerate(response.data or ()):
    file = Path(f"image_{number}.png")
    file.write_bytes(base64.b64decode(image.b64_json or ""))
    print(file)
