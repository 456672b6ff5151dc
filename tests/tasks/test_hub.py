"""A data set by its hub name, from a server on this machine that answers as the hub does (the hub itself was never asked)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

COMMIT = "a" * 40
ROWS = [{"prompt": f"{i} and {i}?", "answer": str(2 * i), "level": i % 3} for i in range(30)]
FILES = {
    "README.md": b"# Sums\n",
    "train.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    "test.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:12]),
}
READ = """
import json, sys
from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.errors import DataError
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
settings = dict(validation_size=2, test_size=0, index_dir=sys.argv[3])
try:
    task = make_task(RowsTaskConfig(path=sys.argv[1], hub_split=sys.argv[2], **settings))
except DataError as error:
    print(json.dumps(str(error)))
else:
    problems = [task.problem(split, i) for split in Split for i in range(task.size(split))]
    print(json.dumps([[p.data[key] for key in ("prompt", "answer", "level")] for p in problems]))
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers that the datasets library asks for."""

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        listed = [{"type": "file", "path": name, "size": len(data), "oid": tag(data)} for name, data in FILES.items()]
        if path == f"/api/datasets/some/sums/tree/{COMMIT}":
            self.send(json.dumps(listed).encode())
        elif path.startswith("/api/datasets/some/sums") and "/tree/" not in path:
            about = {"id": "some/sums", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.send(json.dumps({**about, "private": False, "gated": False, "disabled": False, "tags": []}).encode())
        elif path.startswith("/datasets/some/sums/resolve/") and (name := path.split("/", 6)[6]) in FILES:
            self.send(FILES[name], {"ETag": f'"{tag(FILES[name])}"', "X-Repo-Commit": COMMIT})
        else:
            found = "EntryNotFound" if "/some/sums" in path else "RepoNotFound"
            self.send(b"", {"X-Error-Code": found}, status=404)

    def send(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(endpoint: str, folder: Path, name: str, split: str = "train") -> Any:
    """In a process of its own: the library reads the address of the hub when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", READ, name, split, str(folder / "index")],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_data_set_by_its_hub_name(endpoint: str, tmp_path: Path) -> None:
    for split, count in (("train", 30), ("test", 12)):
        found = read(endpoint, tmp_path, "some/sums", split)
        assert sorted(found) == sorted([row["prompt"], row["answer"], row["level"]] for row in ROWS[:count])


@pytest.mark.parametrize(("name", "split"), [("some/nothing", "train"), ("some/sums", "nowhere")])
def test_what_is_not_there_is_one_clear_error(endpoint: str, tmp_path: Path, name: str, split: str) -> None:
    said = read(endpoint, tmp_path, name, split)
    assert isinstance(said, str) and name in said and (split == "train" or split in said) and "\n" not in said
