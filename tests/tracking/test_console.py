"""What is printed, where: plain lines into a log, a bar on a terminal."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console as RichConsole

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.console import Console, comparison_table
from megatron_vp2o.tracking.runs import load_runs
from tests.tracking.synthetic import reinforcement_rows, supervised_rows, write_run

METRICS = {"rollout/pass_rate": 0.25, "policy/entropy": 0.5, "policy/kl_reference": None, "time/tokens_per_s": 1234.5}
EVALUATION = {"eval/greedy_accuracy": 0.415, "eval/pass@1": 0.4, "eval/pass@16": 0.85, "eval/distinct": 2.345}


class Stream(io.StringIO):
    """Notes what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


class Clock:
    """Seconds that the test lets pass."""

    now = 0.0

    def __call__(self):
        return self.now


def make(steps=100, algorithm=Algorithm.grpo, **options):
    stream, clock = Stream(), Clock()
    return Console(steps=steps, algorithm=algorithm, stream=stream, clock=clock, **options), stream, clock


def test_a_plain_line_has_step_numbers_pace_and_time_left():
    console, stream, clock = make(steps=100)
    with console:
        console.start()
        clock.now = 2.0
        console.step(1, METRICS)
        clock.now = 4.0
        console.step(2, METRICS)
    assert stream.getvalue().splitlines() == [
        "step 1/100  right 25.0%  entropy 0.500  2.00 s/step  1,234 tok/s  ETA 3m 18s",
        "step 2/100  right 25.0%  entropy 0.500  2.00 s/step  1,234 tok/s  ETA 3m 16s",
    ]
    assert stream.flushed == stream.getvalue()


def test_supervised_lines_have_the_loss():
    console, stream, _ = make(algorithm=Algorithm.supervised)
    console.start()
    console.step(1, {"supervised/loss": 2.34567, "optimizer/lr": 1e-4})
    assert stream.getvalue().startswith("step 1/100  loss 2.346  lr 1.0e-4")


def test_the_interval_thins_lines_but_not_first_last_or_evaluations():
    console, stream, _ = make(steps=23, interval=10)
    console.start()
    console.step(0, EVALUATION)
    for step in range(1, 24):
        console.step(step, METRICS | (EVALUATION if step == 15 else {}))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "validation at step 0/23: greedy 41.5%",
        "step 1/23",
        "step 10/23",
        "validation at step 15/23: greedy 41.5%",
        "step 20/23",
        "step 23/23",
    ]
    assert lines[0] == "validation at step 0/23: greedy 41.5%  pass@1 40.0%  pass@16 85.0%  distinct 2.35"


def test_the_time_left_counts_from_the_resumed_step_without_the_first_evaluation():
    console, stream, clock = make(steps=100)
    console.start(40)
    clock.now = 10.0
    console.step(41, METRICS)
    assert "10.00 s/step" in stream.getvalue() and "ETA 9m 50s" in stream.getvalue()

    console, stream, clock = make(steps=100)
    console.start(0)
    clock.now = 500.0
    console.step(0, EVALUATION)
    clock.now = 501.0
    console.step(1, METRICS)
    assert "1.00 s/step" in stream.getvalue() and "ETA 1m 39s" in stream.getvalue()


def test_evaluations_count_in_the_time_left_with_their_share():
    console, stream, clock = make(steps=1000)
    console.start()
    for step in range(1, 401):
        clock.now += 1.0 + (9.0 if step % 10 == 0 else 0.0)
        console.step(step, METRICS)
    assert stream.getvalue().splitlines()[-1].endswith("ETA 19m 00s")  # 600 steps at 1.9 s


def test_the_test_split_is_said_too():
    console, stream, _ = make(steps=1)
    console.start()
    console.step(1, {"test/greedy_accuracy": 0.5, "test/pass@1": 0.25})
    assert stream.getvalue().splitlines()[-1] == "test at step 1/1: greedy 50.0%  pass@1 25.0%"


def test_nan_is_printed_not_raised():
    console, stream, _ = make()
    console.start()
    console.step(1, dict.fromkeys([*METRICS, "optimizer/grad_norm"], float("nan")))
    assert "right NaN" in stream.getvalue() and "grad NaN" in stream.getvalue()


def test_a_phase_is_said_when_it_begins_and_when_it_ends():
    console, stream, clock = make()
    with console.phase("building the [model]"):
        assert stream.flushed == "building the [model] ...\n"
        clock.now = 3.21
    assert stream.getvalue().splitlines()[1:] == ["building the [model]: done in 3.2 s"]
    with pytest.raises(ValueError), console.phase("reading"):
        raise ValueError
    assert stream.getvalue().splitlines()[-1] == "reading: failed after 0.00 s"


def test_a_disabled_console_is_silent():
    console, stream, _ = make(enabled=False)
    with console, console.phase("building"):
        console.start()
        console.step(1, METRICS | EVALUATION)
        console.print("text")
    assert stream.getvalue() == ""


def test_force_color_brings_no_cursor_movement_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, stream, _ = make()
    with console, console.phase("building"):
        console.start()
        console.step(1, METRICS)
    assert not re.search(r"\x1b\[\d*[ABCDHJK]", stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 3


TERMINAL = textwrap.dedent(
    """
    import time
    from megatron_vp2o.config.schema import Algorithm
    from megatron_vp2o.tracking.console import Console
    with Console(steps=3, algorithm=Algorithm.grpo) as console:
        with console.phase("building"), console.phase("the experts"):
            time.sleep(0.2)
        console.start()
        for step in range(4):
            with console.phase("evaluating"):
                time.sleep(0.1)
            console.step(step, {"rollout/pass_rate": step / 4, "eval/greedy_accuracy": 0.5, "time/tokens_per_s": 10.0})
        console.print("after the bar")
    print("end")
    """
)


def test_a_terminal_gets_a_live_bar(monkeypatch):
    """In a real pseudo-terminal of 80 columns."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0, output.decode()
    text = output.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "━" in plain and "3/3" in plain
    assert "right 75.0%" in plain and "evaluating ..." in plain and "10 tok/s" in plain
    assert "the experts: done in" in plain and "building: done in" in plain
    assert "validation at step 2/3: greedy 50.0%" in plain
    assert "after the bar" in plain and plain.rstrip().endswith("end")
    assert "\x1b[?25h" in text  # the cursor is back
    assert "Traceback" not in plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        write_run(base / "tiny_supervised", supervised_rows(200, 1), Algorithm.supervised),
        write_run(base / "tiny_grpo", reinforcement_rows(20, 2)),
    ]


def render(folders, width=80):
    console = RichConsole(file=io.StringIO(), width=width, record=True)
    console.print(comparison_table(load_runs(folders)))
    return console.export_text()


def test_the_table_compares_first_and_last_evaluation(folders):
    text = render(folders)
    cells = {
        row[0]: row[1:] for row in ([c.strip() for c in line.strip("│\n").split("│")] for line in text.splitlines())
    }
    runs = load_runs(folders)
    for label, key, say in (
        ("greedy accuracy", "eval/greedy_accuracy", fmt.percent),
        ("pass@16", "eval/pass@16", fmt.percent),
        ("coverage of right answers", "eval/coverage", fmt.percent),
        ("distinct right answers", "eval/distinct", fmt.number),
        ("answer entropy (nats)", "eval/answer_entropy", fmt.number),
        ("response length (tokens)", "eval/response_length", fmt.number),
    ):
        values = [run.values(key) for run in runs]
        assert cells[label] == [f"{say(v[0])} → {say(v[-1])}" for v in values]
    assert cells["test greedy accuracy"] == ["–", fmt.percent(runs[1].values("test/greedy_accuracy")[0])]
    assert cells["steps"] == ["200", "20"]
    assert cells["time"] == [fmt.duration(run.values("time/elapsed_s")[-1]) for run in runs]
    assert "supervised" in text and "tiny_supervised" not in text


def test_three_runs_fit_eighty_columns(folders, tmp_path):
    third = write_run(tmp_path / "tiny_vp2o", reinforcement_rows(20, 3))
    assert max(map(len, render([*folders, third]).splitlines())) <= 80
    assert "…" not in render([*folders, third])


NUMBERS = {
    0.0123456: "0.0123",
    4.5678: "4.57",
    1203.4: "1,203",
    999.9: "1,000",
    3.1e-7: "3.1e-7",
    2.5e9: "2.5e9",
    -0.5: "-0.500",
    0.0: "0",
    1500: "1,500",
    float("inf"): "∞",
    float("nan"): "NaN",
}
DURATIONS = {
    0: "0.00 s",
    0.123: "0.12 s",
    12.34: "12.3 s",
    59.96: "1m 00s",
    200: "3m 20s",
    3599.7: "1h 00m",
    3840: "1h 04m",
    51 * 3600: "2d 03h",
}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers(value, text):
    assert fmt.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_durations(seconds, text):
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.4, "+0.400"), (-1.41, "−1.41"), (0.0, "+0")])
def test_signed_numbers(value, text):
    assert fmt.signed(value) == text
