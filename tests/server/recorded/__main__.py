"""Record all exchanges anew, for when what the server answers is meant to change."""

import tempfile
from pathlib import Path

from tests.server.recorded.recording import FAILED, play_all, save


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        played = play_all(Path(folder))
        for name, records in played.items():
            if FAILED in records[-1]:
                raise SystemExit(f"nothing is recorded: on the server {name!r}, {records[-1]}")
        for name, records in played.items():
            save(name, records)
            print(f"{name}: {len(records)} exchanges")


if __name__ == "__main__":
    main()
