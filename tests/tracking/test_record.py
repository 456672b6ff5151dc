"""The record survives what can happen to it: kills, torn lines, damage, resumption."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.errors import UserError
from megatron_vp2o.tracking import record as record_module
from megatron_vp2o.tracking.record import MetricsRecord, RecordError, read

KEYS = ("step", "loss", "eval/accuracy")


def write(folder, rows, keys=KEYS):
    with MetricsRecord(folder, keys) as record:
        for row in rows:
            record.append(row)
    return folder / "metrics.jsonl"


def rows(steps, start=0):
    return [{"step": step, "loss": 1 / (step + 1)} for step in range(start, steps)]


def test_every_line_is_strict_json_with_every_key_in_order(tmp_path):
    path = write(tmp_path, [{"step": 0, "eval/accuracy": 0.5}, {"loss": math.nan, "step": 1}])
    lines = path.read_text().splitlines()
    assert lines == [
        '{"step": 0, "loss": null, "eval/accuracy": 0.5}',
        '{"step": 1, "loss": "NaN", "eval/accuracy": null}',
    ]


def test_columns_come_back(tmp_path):
    write(tmp_path, [{"step": 0, "eval/accuracy": 1}, {"step": 1, "loss": -math.inf}, {"step": 2, "loss": math.inf}])
    columns = read(tmp_path)
    assert columns == {"step": [0, 1, 2], "loss": [None, -math.inf, math.inf], "eval/accuracy": [1, None, None]}
    assert list(columns) == list(KEYS)
    assert isinstance(columns["eval/accuracy"][0], int)


@settings(deadline=None, max_examples=50)
@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_floats_read_back_exactly(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run")
    write(folder, [{"step": 0, "loss": value}])
    (back,) = read(folder)["loss"]
    assert back is not None
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)


def test_numpy_scalars_are_numbers_and_tensors_are_not(tmp_path):
    write(tmp_path / "a", [{"step": np.int64(3), "loss": np.float32(0.5), "eval/accuracy": np.float64(0.25)}])
    assert read(tmp_path / "a") == {"step": [3], "loss": [0.5], "eval/accuracy": [0.25]}
    with pytest.raises(TypeError, match=r"metric 'loss' is tensor\(1\.\).*\.item\(\)"):
        write(tmp_path / "b", [{"step": 0, "loss": torch.tensor(1.0)}])


def test_an_unknown_key_is_refused_with_the_nearest_known(tmp_path):
    with pytest.raises(ValueError, match=r"unknown metric 'eval/acuracy' \(did you mean 'eval/accuracy'\?\)"):
        write(tmp_path, [{"step": 0, "eval/acuracy": 1.0}])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("step", [None, 1.5, 2, 1])
def test_steps_only_go_up(tmp_path, step):
    with MetricsRecord(tmp_path, KEYS) as record:
        record.append({"step": 2})
        with pytest.raises(ValueError, match=f"a whole `step` after 2, got {step}"):
            record.append({"step": step})
    assert read(tmp_path)["step"] == [2]


def test_a_schema_needs_the_step(tmp_path):
    with pytest.raises(ValueError, match="must have 'step'"):
        MetricsRecord(tmp_path, ["loss"])


def test_a_line_is_synced_before_append_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else descriptor)
        real(descriptor)

    monkeypatch.setattr(record_module.os, "fsync", fsync)
    with MetricsRecord(tmp_path, KEYS) as record:
        for step in range(3):
            synced.clear()
            record.append({"step": step})
            assert str(tmp_path / "metrics.jsonl") in map(str, synced)
            assert len(read(tmp_path)["step"]) == step + 1


def test_an_existing_record_is_not_appended_to_unasked(tmp_path):
    write(tmp_path, rows(3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RecordError, match=r"already holds a run's record"):
        write(tmp_path, rows(6, start=3))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\0\0\0\0"])
@pytest.mark.parametrize("written", [5, 6, 9])
def test_a_resumed_record_equals_an_uninterrupted_one(tmp_path, written, torn):
    whole = write(tmp_path / "whole", rows(12)).read_bytes()
    path = write(tmp_path / "killed", rows(written))
    path.write_bytes(path.read_bytes() + torn)
    with MetricsRecord(tmp_path / "killed", KEYS) as record:
        record.truncate_after(4)
        for row in rows(12, start=5):
            record.append(row)
    assert path.read_bytes() == whole
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_minus_one_starts_afresh(tmp_path):
    whole = write(tmp_path / "whole", rows(3)).read_bytes()
    path = write(tmp_path / "run", rows(7))
    for folder in ("run", "new"):
        with MetricsRecord(tmp_path / folder, KEYS) as record:
            record.truncate_after(-1)
            for row in rows(3):
                record.append(row)
        assert (tmp_path / folder / "metrics.jsonl").read_bytes() == whole
    assert path.exists()


def test_what_is_dropped_may_be_damaged(tmp_path):
    path = write(tmp_path, rows(5))
    path.write_bytes(path.read_bytes() + b"rubbish\n")
    with MetricsRecord(tmp_path, KEYS) as record:
        record.truncate_after(4)
    assert read(tmp_path)["step"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", [3, 7])
def test_resuming_where_the_record_has_no_line_is_refused(tmp_path, step):
    path = write(tmp_path, [{"step": s} for s in (0, 1, 2, 4)])
    before = path.read_bytes()
    with pytest.raises(RecordError, match=f"has no line for step {step}.*start in another run_dir"):
        MetricsRecord(tmp_path, KEYS).truncate_after(step)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_resuming_without_a_record_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"has no line for step 3.*no such file"):
        MetricsRecord(tmp_path / "none", KEYS).truncate_after(3)


def test_keys_that_came_later_are_filled_in(tmp_path):
    write(tmp_path, rows(3), keys=("step", "loss"))
    with MetricsRecord(tmp_path, KEYS) as record:
        record.truncate_after(1)
        record.append({"step": 2, "eval/accuracy": 0.5})
    assert read(tmp_path)["eval/accuracy"] == [None, None, 0.5]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(list(json.loads(line)) == list(KEYS) for line in lines)


def test_keys_that_are_gone_are_not_dropped_silently(tmp_path):
    path = write(tmp_path, rows(3))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"line 1: has 'eval/accuracy', which this run does not record"):
        MetricsRecord(tmp_path, ("step", "loss")).truncate_after(2)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not a JSON object"),
        ("[1, 2]", "not a JSON object but '\\[1, 2\\]'"),
        ('{"step": 1, "loss": NaN}', "NaN is not JSON"),
        ('{"step": 1, "loss": "much"}', "loss is 'much', not a number"),
        ('{"step": 1, "loss": true}', "loss is 'True', not a number"),
        ('{"loss": 1.0}', "step is None, which must be a whole number after 0"),
        ('{"step": 0}', "step is 0, which must be a whole number after 0"),
        ('{"step": "NaN"}', "step is nan"),
        ("\udcff", "not a JSON object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, reason):
    path = write(tmp_path, rows(1))
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b'\n{"step": 2}\n')
    with pytest.raises(RecordError, match=rf"metrics\.jsonl, line 2: .*{reason}"):
        read(tmp_path)
    with pytest.raises(RecordError, match="line 2"):
        MetricsRecord(tmp_path, KEYS).truncate_after(2)


def test_a_line_being_written_is_left_out(tmp_path):
    path = write(tmp_path, rows(2))
    path.write_bytes(path.read_bytes() + b'{"step": 2, "loss": 0.3')
    assert read(tmp_path)["step"] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"", "no line yet"), (b"{", "no line yet")]
)
def test_a_missing_or_empty_record_is_one_clear_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_record_survives_sigkill(tmp_path):
    """Whenever it comes, every line reported as written is there and whole."""
    code = textwrap.dedent(
        """
        import sys
        from megatron_vp2o.tracking.record import MetricsRecord
        record = MetricsRecord(sys.argv[1], ["step", *(f"m{i}" for i in range(200))])
        for step in range(100000):
            record.append({"step": step, **{f"m{i}": step + i / 7 for i in range(200)}})
            print(step, flush=True)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split()]
    steps = read(tmp_path)["step"]
    assert steps == list(range(len(steps)))
    assert len(steps) in (len(said), len(said) + 1)


def test_truncation_that_fails_leaves_the_record(tmp_path, monkeypatch):
    path = write(tmp_path, rows(6))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsRecord(tmp_path, KEYS).truncate_after(3)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
