"""All exchanges, by the server that they are played on, and their recorded answers."""

import difflib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.server.recorded.bounds import BOUNDS
from tests.server.recorded.common import COMMON
from tests.server.recorded.engine_errors import ENGINE_ERRORS
from tests.server.recorded.exchange import HOST, Exchange
from tests.server.recorded.good import GOOD
from tests.server.recorded.guarded import KEYS, KEYS_FILE, MODERATED, POLICY
from tests.server.recorded.hang_ups import HANG_UPS
from tests.server.recorded.leaving import LEAVING
from tests.server.recorded.operations import FILES, METRICS, OPERATIONS, QUEUES, STORAGE_KEY
from tests.server.recorded.refusals import REFUSALS
from tests.server.recorded.stage import Setting, stage

Record = dict[str, Any]

FAILED = "failed"

FOLDER = Path(__file__).parent

_ALIAS = ("--model-aliases", "gpt-image-1")

SETTINGS = {
    "plain": Setting(
        (
            *(*_ALIAS, "--storage-key", STORAGE_KEY, "--accept", "openai"),
            *("--allowed-hosts", HOST),
        )
    ),
    "common": Setting(("--model-aliases", "*")),
    "guarded": Setting(
        ("--api-keys-file", "keys.yaml", "--moderation-policy", "policy.yaml"),
        {"keys.yaml": KEYS_FILE, "policy.yaml": POLICY},
    ),
    "bounds": Setting(
        (
            *("--storage", "none", "--no-playground", "--allow-unknown-fields"),
            *("--served-model-name", "foxes", "--max-n", "2", "--max-prompt", "40"),
            *("--max-requests", "1", "--max-body-bytes", "2000", "--max-header-bytes", "2000"),
            *("--body-timeout-s", "1", "--header-timeout-s", "1", "--keepalive-s", "1"),
        )
    ),
    "leaving": Setting(
        (
            *("--drain-timeout-s", "1", "--max-storage-bytes", "150"),
            *("--public-url", "https://pictures.test/base/"),
        ),
        engine=False,
    ),
}

EXCHANGES: dict[str, list[Exchange]] = {
    "plain": [
        *OPERATIONS,
        *GOOD,
        *REFUSALS,
        *ENGINE_ERRORS,
        *FILES,
        *HANG_UPS,
        *QUEUES,
        *METRICS,
    ],
    "common": COMMON,
    "guarded": [*KEYS, *MODERATED],
    "bounds": BOUNDS,
    "leaving": LEAVING,
}


def play_all(folder: Path) -> dict[str, list[Record]]:
    """What comes of every exchange now, by the server's name; all servers run at a time.

    A server's last record is of an exchange that has failed, with the reason, if one has.

    Args:
        folder: for their files.
    """

    def play(name: str) -> list[Record]:
        records: list[Record] = []
        with stage(SETTINGS[name], folder / name) as playing:
            for exchange in EXCHANGES[name]:
                try:
                    records.append(playing.play(exchange))
                except (AssertionError, OSError, ValueError) as error:
                    records.append({"name": exchange.name, FAILED: repr(error)})
                    playing.stop_engine()  # whatever is under way ends with it
                    break
        return records

    with ThreadPoolExecutor(len(SETTINGS)) as threads:
        return dict(zip(SETTINGS, threads.map(play, SETTINGS), strict=True))


def load(name: str) -> list[Record]:
    """The recording of a server."""
    return [json.loads(line) for line in _file(name).read_text(encoding="utf-8").splitlines()]


def save(name: str, records: list[Record]) -> None:
    lines = [
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records
    ]
    _file(name).write_text("".join(lines), encoding="utf-8")


def difference(recorded: Record, now: Record) -> str:
    """What has changed, line by line; empty where nothing has."""
    if recorded == now:
        return ""
    lines = difflib.unified_diff(_lines(recorded), _lines(now), "recorded", "now", "", "", 2, "")
    return "\n".join(lines)


def _file(name: str) -> Path:
    return FOLDER / f"{name}.jsonl"


def _lines(record: Record) -> list[str]:
    """Short enough to see what is different in them."""
    text = json.dumps(record, ensure_ascii=False, indent=1)
    return text.replace(',\\"', ',\n      \\"').replace("\\n", "\\n\n      ").split("\n")
