"""The processes in which answers are graded: a nursery that imports the libraries once, and workers forked from it.

The nursery lives as long as its control socket is open, so it ends with the process that trains, however that ends; the
kernel kills workers when the nursery is gone. It runs in a session of its own: an interrupt from the terminal goes to
the process that trains, which then closes the pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.errors import UserError
from megatron_vp2o.rewards.channel import WorkerChannel
from megatron_vp2o.rewards.grade import MEMORY, Grade, RowError, wrong
from megatron_vp2o.rewards.graders import BatchGrader, Grader, make_grader

FORK, KILL = 0, 1
REQUEST = struct.Struct("!BI")
"""What is asked of the nursery: FORK with the socket of the new worker, or KILL with the number of one."""
_PR_SET_PDEATHSIG = 1


def nursery(control: socket.socket, config: RewardConfig, names: Sequence[str], parent: int) -> None:
    """Serve fork and kill requests until the other side is gone.

    The first message says whether the graders could be made: {"ready": true} or {"fatal": reason}.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = WorkerChannel(control)
    try:
        graders = {name: make_grader(name, config) for name in names}
    except UserError as error:
        channel.send({"fatal": str(error)})
        return
    channel.send({"ready": True})
    children: set[int] = set()
    try:
        while os.getppid() == parent:
            readable, _, _ = select.select([control], [], [], 1.0)
            _reap(children)
            if readable and not _serve_request(control, graders, config, children):
                return
    finally:
        for child in children:
            _kill(child)


def _serve_request(
    control: socket.socket, graders: Mapping[str, Grader | BatchGrader], config: RewardConfig, children: set[int]
) -> bool:
    """False when the other side is gone."""
    try:
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 1)
    except ConnectionError:
        return False
    if len(request) < REQUEST.size:
        return False
    what, child = REQUEST.unpack(request)
    if what == KILL:
        if child in children:  # not yet reaped, so the number is still this child's
            _kill(child)
        return True
    own = os.getpid()
    child = os.fork()
    if child == 0:
        control.close()
        status = 1
        try:
            _become_worker(own, config.memory_mib)
            work(WorkerChannel(socket.socket(fileno=descriptors[0])), graders, config.seed)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    for descriptor in descriptors:
        os.close(descriptor)
    children.add(child)
    return True


def _kill(child: int) -> None:
    """Kill a worker and what it started (in its process group)."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


def _reap(children: set[int]) -> None:
    for child in list(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                continue
        children.discard(child)


def _become_worker(nursery_pid: int, memory_mib: int | None) -> None:
    """A process group of its own, death with the nursery, limited memory, and first in line when memory runs out."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery_pid:  # it died before the line above
        os._exit(1)
    if memory_mib is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def work(channel: WorkerChannel, graders: Mapping[str, Grader | BatchGrader], seed: int) -> None:
    """Grade chunk after chunk: a chunk is (name of the grader, [(number, prompt, response, row), ...])."""
    channel.send({"pid": os.getpid()})
    try:
        for grader in graders.values():
            grader.prepare()
    except UserError as error:
        channel.send({"fatal": str(error)})
        return
    channel.send({"ready": True, "cpu": time.process_time()})
    while (chunk := channel.receive()) is not None:
        name, items = chunk
        grader = graders[name]
        random.seed(seed)
        answers = answer_batch(grader, items) if isinstance(grader, BatchGrader) else _one_by_one(grader, items, seed)
        for answer in answers:
            channel.send(answer | {"cpu": time.process_time()})
            if answer.get("last"):  # memory is in pieces: a fresh worker is better
                return


def _one_by_one(
    grader: Grader, items: Sequence[tuple[int, str, str, Mapping[str, Any]]], seed: int
) -> Iterator[dict[str, Any]]:
    for number, prompt, response, row in items:
        random.seed(seed)  # some checkers draw: the same answer gets the same grade whatever is graded before it
        try:
            grade = grader.grade(prompt, response, row)
        except RowError as error:
            yield {"number": number, "error": str(error)}
        except MemoryError:
            yield _message(number, wrong(MEMORY)) | {"last": True}
        except Exception as error:  # a library that fails on what a model wrote: the answer is not right
            yield _message(number, wrong(f"{type(error).__name__} in the reward"))
        else:
            yield _message(number, grade)


def answer_batch(
    grader: BatchGrader, items: Sequence[tuple[int, str, str, Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """A user's function on all items, and where it raises on each alone, to find the one that it raises for."""
    numbers = [item[0] for item in items]
    try:
        grades = grader.grade_all(*(list(column) for column in zip(*(item[1:] for item in items), strict=True)))
    except MemoryError:
        if len(items) == 1:
            yield _message(numbers[0], wrong(MEMORY)) | {"last": True}
        else:
            yield {"split": True, "last": True}
    except RowError as error:
        yield {"number": numbers[0], "error": str(error)}
    except Exception as error:
        said = _raised(error)
        if len(items) == 1:
            yield {"number": numbers[0], "error": said}
            return
        for item in items:
            failed = False
            for answer in answer_batch(grader, [item]):
                failed = "error" in answer
                yield answer
            if failed:
                return
        yield {"number": numbers[0], "error": f"{said}, for the batch that begins with this row and for no row alone"}
    else:
        for number, grade in zip(numbers, grades, strict=True):
            yield _message(number, grade) if isinstance(grade, Grade) else {"number": number, "error": grade}


def _raised(error: BaseException) -> str:
    """What was raised, and where in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _message(number: int, grade: Grade) -> dict[str, Any]:
    return {
        "number": number,
        "reward": grade.reward,
        "reason": grade.reason,
        "canonical": grade.canonical,
        "correct": grade.correct,
        "parts": dict(grade.parts),
    }


def main(descriptor: int) -> None:
    """What the nursery's command line calls: the control socket's descriptor is inherited."""
    control = socket.socket(fileno=descriptor)
    config, names, parent = WorkerChannel(control).receive()
    nursery(control, config, names, parent)
    sys.exit(0)
