"""One run of LangChain's DALL-E wrapper. Its first argument is JSON: the `options` of the wrapper
and the `prompt`. Prints what it returns, as JSON.
"""

import json
import sys

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

arguments = json.loads(sys.argv[1])
wrapper = DallEAPIWrapper(**arguments["options"])
print(json.dumps({"answer": wrapper.run(arguments["prompt"])}))
