"""Record all exchanges anew, for when what the server answers is meant to change."""

import tempfile
from pathlib import Path

from tests.server.recorded.recording import play_all, save


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, records in play_all(Path(folder)).items():
            save(name, records)
            print(f"{name}: {len(records)} exchanges")


if __name__ == "__main__":
    main()
