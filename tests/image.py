"""What the Dockerfile says, as tests need it."""

import json
import re
from pathlib import Path

DOCKERFILE = (Path(__file__).parents[1] / "Dockerfile").read_text()


def variables() -> dict[str, str]:
    """The image's environment, but for what stands for a build's argument or another variable."""
    (block,) = re.findall(r"^ENV ((?:.+\\\n)*.+)$", DOCKERFILE, re.M)
    pairs = (word.partition("=") for word in block.replace("\\\n", " ").split())
    return {name: value for name, _, value in pairs if "$" not in value}


def command(instruction: str) -> list[str]:
    """That of an instruction in JSON, such as ENTRYPOINT."""
    (found,) = re.findall(rf"^ *{instruction} (\[.+\])$", DOCKERFILE, re.M)
    return json.loads(found)


def cache_made_by() -> list[str]:
    """The command that makes /cache."""
    (found,) = re.findall(r"(install --directory .+ /cache)$", DOCKERFILE, re.M)
    return found.split()
