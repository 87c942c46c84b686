"""Other people's clients, in an environment of their own: `make test-slow` installs them.

LiteLLM, LangChain and a Node.js are in `.venv-clients`, since their pins are not SGLang's; Node's
packages are beside the scripts that use them. What is missing fails a test, it skips none.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent
PATIENCE_S = 300.0

_VARIABLES = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
}
# A developer's own settings of these clients, and of our Python.
_FOREIGN = ("OPENAI_", "LITELLM_", "LANGCHAIN_", "LANGSMITH_", "AI_SDK_", "NODE_", "PYTHON")


def program(name: str) -> Path:
    """A program of these packages."""
    path = ENVIRONMENT / "bin" / name
    if not path.exists():
        pytest.fail(f"no {path.relative_to(ROOT)}: `make test-slow` installs it")
    return path


def command(name: str, **variables: str) -> list[str | Path]:
    """A command line that runs a program, which looks nothing up and reports to nobody.

    Args:
        variables: that it gets too.
    """
    unset = [f"--unset={variable}" for variable in os.environ if variable.startswith(_FOREIGN)]
    values = [f"{variable}={value}" for variable, value in {**_VARIABLES, **variables}.items()]
    return ["env", *unset, *values, program(name)]


def start(script: str, **arguments: object) -> subprocess.Popen[str]:
    """Start a script with arguments, which it gets as JSON.

    Args:
        script: below this folder; `.mjs` is Node's, `.py` Python's.
    """
    interpreter = {".mjs": "node", ".py": "python"}[Path(script).suffix]
    return subprocess.Popen(
        [*command(interpreter), SCRIPTS / script, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict:
    """What a script printed, once its stdin is closed and it has ended well."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    return json.loads(stdout)


def run(script: str, **arguments: object) -> dict:
    """`start` and `answer`."""
    return answer(start(script, **arguments))
