"""Evaluation through a server that is started, watched and ended: a fake one in a real process, and vLLM where there is one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.evaluate import main
from megatron_vp2o.evaluation.endpoint import EndpointError
from megatron_vp2o.evaluation.launched import Launched
from megatron_vp2o.evaluation.model import Sampling
from megatron_vp2o.rollout.launch import ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VP2O_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
SAMPLING = Sampling(0.6, 0.95, 16, 0)
CODE = """
import os, sys, threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from tests.evaluation.server import Behaviour, Handler
port, lives = int(sys.argv[1]), Path(sys.argv[2])
left = int(lives.read_text())
if left < 0:
    sys.exit("no GPU here")
it = Handler.behaviour = Behaviour()
dying = threading.Lock()
def answer(body):
    if left and len(it.requests) >= 3:
        dying.acquire()  # for good: another thread would truncate the file while this one ends the process
        lives.write_text(str(left - 1))
        os._exit(9)
    return body["prompt"][::-1]
it.answer = answer
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    """A server that ends at the third request of each of its first lives; how many those are is in the file `lives`."""
    process = ServerProcess(
        lambda model, port: [sys.executable, "-c", CODE, str(port), str(model / "lives")],
        {"PYTHONPATH": str(ROOT)},
        free_port(),
        tmp_path / "log",
    )
    made = Launched(
        "x",
        f"{process.url}/v1",
        "served",
        chat=False,
        pause_s=0.01,
        concurrency=2,
        process=process,
        folder=tmp_path,
        startup_s=60.0,
    )
    yield made
    made.close()
    assert not process.running


def test_a_server_that_dies_is_started_again_and_the_batch_is_whole(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "lives").write_text("2")
    launched.check([], 16)
    prompts = [f"prompt {number}" for number in range(8)]
    assert [answer.text for answer in launched.generate(prompts, range(8), SAMPLING)] == [
        text[::-1] for text in prompts
    ]
    assert launched.restarts == 2 and launched.identity["kind"] == "vllm"


def test_one_that_always_dies_ends_the_evaluation(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "lives").write_text("9")
    launched.check([], 16)
    with pytest.raises(EndpointError, match=r"ended 4 times; .*log ends with"):
        launched.generate([f"prompt {number}" for number in range(8)], range(8), SAMPLING)


def test_one_that_cannot_start_says_why(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "lives").write_text("-1")
    with pytest.raises(EndpointError, match=r"ended while it started; .*no GPU here"):
        launched.check([], 16)


def test_an_error_of_a_server_that_lives_is_not_answered_with_a_restart(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "lives").write_text("0")
    launched.check([], 16)
    launched.name = "another"
    with pytest.raises(EndpointError, match="answered with the model 'served'"):
        launched.generate(["prompt"], [0], SAMPLING)
    assert launched.restarts == 0


def test_bad_command_lines(tmp_path: Path, capsys: Any) -> None:
    arguments = [str(tmp_path), "--suite", "aime24", "--data", "own", "--lengths", "16", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--serve", str(tmp_path / "python")]) == 2
    assert "there is no such interpreter; make vllm-env makes" in capsys.readouterr().err
    assert main([*arguments, "--serve", sys.executable]) == 2
    assert "is no Hugging Face folder (it has no config.json): convert it first" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}: make test-vllm makes its environment")
def test_a_folder_is_evaluated_through_vllm(tmp_path: Path) -> None:
    """Greedy answers through a real server are those of the embedded engine. The model is untrained: near-ties may fall the other
    way late in an answer, and vLLM leaves out bytes that are no text yet."""
    from tools.arithmetic_rows import write_checkpoint

    folder = tmp_path / "hf"
    write_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    settings = ["--suite", "gpqa,min_thinking_1", "--data", "own", "--lengths", "16", "--limit", "3", "--workers", "1"]
    found = {}
    for name, how in (("served", ["--serve", str(PYTHON)]), ("embedded", [])):
        out = tmp_path / name
        status = main([f"mine={folder}", *how, "--temperature", "0", "--out", str(out), *settings])
        assert status == 0, (out / "server-mine.log").read_text()[-2000:]
        found[name] = {
            (file.name, row["problem"]): (row["text"], row["truncated"])
            for file in out.rglob("*.jsonl")
            for row in map(json.loads, file.read_text().splitlines())
            if "problem" in row
        }
    assert len(found["served"]) == 6 and any(text for text, _ in found["served"].values())
    pairs = [(text, found["embedded"][key][0]) for key, (text, _) in found["served"].items()]
    assert all(served[:2] == embedded[:2] for served, embedded in pairs), pairs
    assert sum(served == embedded for served, embedded in pairs) >= 3, pairs
