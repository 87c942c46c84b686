"""One image_generation of LiteLLM, with its arguments as JSON; prints the response as JSON."""

import json
import sys

import litellm

print(litellm.image_generation(**json.loads(sys.argv[1])).model_dump_json())
