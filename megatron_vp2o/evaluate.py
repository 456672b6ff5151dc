"""Composition root: `python -m megatron_vp2o.evaluate MODEL [MODEL ...] --out FOLDER`, alone or under torchrun.

A MODEL is `[LABEL[@LENGTH]=]PLACE`; a place is a run's folder, a checkpoint, a Hugging Face folder, or
`http://HOST:PORT/v1#NAME`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import ConfigError, UserError

DEFAULT_OUT = "runs/evaluation"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m megatron_vp2o.evaluate",
        description="Evaluate checkpoints as the paper does, and write its tables and figures. Started again after an "
        "interruption it goes on where it was.",
    )
    made.add_argument(
        "models", nargs="*", metavar="[LABEL[@LENGTH]=]PLACE", help="run, checkpoint, Hugging Face folder, URL#NAME"
    )
    made.add_argument("--out", default=DEFAULT_OUT, metavar="FOLDER", help="results folder (default: %(default)s)")
    made.add_argument(
        "--suite", default="paper", metavar="NAMES", help="suites and benchmarks, with commas (default: paper)"
    )
    made.add_argument("--lengths", default="8k,16k", help="most new tokens, with commas (default: %(default)s)")
    made.add_argument("--steps", default="every", help="of runs: every, last, or numbers (default: %(default)s)")
    made.add_argument(
        "--data", default="data/eval", help="folder with the benchmarks' rows; `own`: the few problems of our own"
    )
    made.add_argument("--samples", type=int, help="of each problem (default: the benchmark's own number)")
    made.add_argument("--limit", type=int, help="only so many problems of each benchmark")
    made.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: %(default)s)")
    made.add_argument("--top-p", type=float, default=0.95, help="nucleus (default: %(default)s)")
    made.add_argument(
        "--seed", type=int, default=0, help="of samples and of the order of choices (default: %(default)s)"
    )
    made.add_argument("--batch", type=int, default=64, help="answers generated together (default: %(default)s)")
    made.add_argument("--workers", type=int, help="grading processes of each kind (default: the cores, at most 8)")
    made.add_argument(
        "--thinking", choices=("true", "false"), help="handed to chat templates that know enable_thinking"
    )
    made.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help="runs, checkpoints, folders: tokens of a prompt with its answer (default: what the model was made for)",
    )
    made.add_argument("--tensor-parallel", type=int, default=1)
    made.add_argument("--pipeline-parallel", type=int, default=1)
    made.add_argument("--expert-parallel", type=int, default=1)
    made.add_argument(
        "--serve",
        metavar="PYTHON",
        help="Hugging Face folders: start a vLLM server for each, with this interpreter, and end it afterwards",
    )
    made.add_argument("--completions", action="store_true", help="endpoints: plain completions instead of chat")
    made.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="endpoints: of one answer (default: %(default)s)"
    )
    made.add_argument("--concurrency", type=int, default=32, help="endpoints: requests at once (default: %(default)s)")
    made.add_argument("--tokenizer", metavar="FOLDER", help="endpoints: counts thinking and solution tokens exactly")
    made.add_argument("--step", type=int, default=0, help="endpoints: the training step that is served")
    made.add_argument("--baseline", metavar="LABEL", help="that others are compared with (default: the first)")
    made.add_argument(
        "--standings", metavar="FOLDER", help="cached Codeforces standings, for ratings by simulated contests"
    )
    made.add_argument(
        "--paper", action="store_true", help="show the paper's own numbers beside, labelled as the paper's"
    )
    made.add_argument("--report-only", action="store_true", help="tables and figures of what is there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, then report. Returns the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _check(options)
        if not options.report_only:
            _evaluate(options)
        if os.environ.get("RANK", "0") == "0":
            return _report(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this stopped", file=sys.stderr)
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    if not options.models and not options.report_only:
        raise ConfigError("no model is named: LABEL=FOLDER or LABEL=http://HOST:PORT/v1#NAME (--help)")
    if not 0 <= options.temperature <= 1000:
        raise ConfigError(f"--temperature {options.temperature}: from 0 (greedy) to 1000")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p}: above 0, at most 1")
    if options.serve is not None and not Path(options.serve).is_file():
        raise ConfigError(
            f"--serve {options.serve}: there is no such interpreter; make vllm-env makes .venv-vllm/bin/python"
        )
    for name in ("limit", "samples", "batch", "workers", "concurrency", "timeout", "max-sequence-length"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value}: above 0")


def _evaluate(options: argparse.Namespace) -> None:
    """Everything that can be wrong with the command is found before the first model is loaded."""
    from megatron_vp2o.evaluation.benchmarks import chosen
    from megatron_vp2o.evaluation.data import load
    from megatron_vp2o.evaluation.grading import Grading
    from megatron_vp2o.evaluation.model import named, token_count
    from megatron_vp2o.evaluation.run import Settings, parts_of

    lengths = tuple(dict.fromkeys(map(token_count, options.lengths.split(","))))
    settings = Settings(
        lengths, options.temperature, options.top_p, options.seed, options.samples, options.limit, options.batch
    )
    asked = [load(benchmark, options.data, options.seed) for benchmark in chosen(options.suite.split(","))]
    wanted = [named(text) for text in options.models]
    parts = {one: parts_of(asked, lengths if one.length is None else (one.length,)) for one in wanted}
    out = Path(options.out)
    remote = [one for one in wanted if options.serve or one.place.startswith(("http://", "https://"))]
    stored = [one for one in wanted if one not in remote]
    for one in remote:
        if not one.place.startswith(("http://", "https://")) and not (Path(one.place) / "config.json").is_file():
            raise ConfigError(
                f"--serve: {one.place} is no Hugging Face folder (it has no config.json): convert it first"
            )
    with Grading(options.workers) as grading:
        if os.environ.get("RANK", "0") == "0":
            for questions in asked:
                grading.open(questions.benchmark.grader)  # a sandbox or a library that is missing
        if remote and os.environ.get("RANK", "0") == "0":
            _evaluate_remote(options, remote, parts, settings, out, grading)
        if stored:
            _evaluate_stored(options, stored, parts, settings, out, grading)


def _evaluate_remote(
    options: argparse.Namespace, wanted: Sequence[Any], parts: Any, settings: Any, out: Path, grading: Any
) -> None:
    from contextlib import ExitStack

    from megatron_vp2o.evaluation.endpoint import Endpoint
    from megatron_vp2o.evaluation.launched import Launched, server_of
    from megatron_vp2o.evaluation.run import evaluate, samples_of

    count = None
    if options.tokenizer is not None:
        from megatron_vp2o.tasks.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(options.tokenizer)
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    thinking = {"chat_template_kwargs": {"enable_thinking": options.thinking == "true"}} if options.thinking else {}
    shared: dict[str, Any] = {
        "step": options.step,
        "chat": not options.completions,
        "timeout_s": options.timeout,
        "concurrency": options.concurrency,
        "count": count,
        "options": thinking,
    }
    with ExitStack() as started:

        def models() -> Iterator[tuple[Endpoint, Any]]:
            for one in wanted:
                url, _, name = one.place.partition("#")
                if url.startswith(("http://", "https://")):
                    yield Endpoint(one.label, url, name, **shared), parts[one]
                    continue
                import torch

                folder, log = Path(one.place), out / f"server-{one.label}.log"
                process = server_of(options.serve, folder, one.label, log, cpu=not torch.cuda.is_available())
                served = Launched(one.label, f"{process.url}/v1", one.label, process=process, folder=folder, **shared)
                started.callback(served.close)
                yield served, parts[one]
                served.close()  # before the next model's server starts

        evaluate(models(), sum(samples_of(parts[one], settings) for one in wanted), settings, out, grading)


def _evaluate_stored(
    options: argparse.Namespace, wanted: Sequence[Any], parts: Any, settings: Any, out: Path, grading: Any
) -> None:
    from megatron_vp2o.parallel import failure

    with failure.ends_all_ranks():
        failure.join(timedelta(minutes=10))
        from megatron_vp2o.megatron.platform.cpu import enable_cpu

        enable_cpu()  # before anything else imports megatron.core; does nothing where there is CUDA
        from megatron_vp2o.config.schema import ParallelConfig
        from megatron_vp2o.evaluation.embedded import Loader, checkpoints
        from megatron_vp2o.evaluation.run import evaluate, samples_of
        from megatron_vp2o.megatron.platform import world
        from megatron_vp2o.parallel.groups import first_rank_says

        world.set_threads(None)
        parallel = ParallelConfig(
            tensor_parallel=options.tensor_parallel,
            pipeline_parallel=options.pipeline_parallel,
            expert_parallel=options.expert_parallel,
        )
        found = [(one, checkpoint) for one in wanted for checkpoint in checkpoints(one.label, one.place, options.steps)]
        _refuse_clashes([(c.label, c.step, length) for one, c in found for length in {p.length for p in parts[one]}])
        with world.joined(parallel, options.seed) as groups, failure.tells_all_ranks():

            class Together:
                rank = groups.rank

                def first_says(self, value: Any) -> Any:
                    return first_rank_says(value, groups.world)

            thinking = None if options.thinking is None else options.thinking == "true"
            loader = Loader(groups, parallel, options.batch, thinking, options.max_sequence_length)

            def models() -> Iterator[tuple[Any, Any]]:
                for one, checkpoint in found:
                    yield loader.load(checkpoint), parts[one]

            total = sum(samples_of(parts[one], settings) for one, _ in found)
            evaluate(models(), total, settings, out, grading, Together())


def _refuse_clashes(keys: Sequence[tuple[str, int, int]]) -> None:
    if twice := {key for key in keys if keys.count(key) > 1}:
        label, step, length = min(twice)
        raise ConfigError(
            f"two models have the label {label} and the step {step}, and are to be evaluated at {length} tokens: give each a "
            "label of its own, as in grpo=runs/x, or a length of its own, as in grpo@8k=runs/x"
        )


def _report(options: argparse.Namespace) -> int:
    from megatron_vp2o.evaluation.report import write_report

    path = write_report(
        Path(options.out),
        baseline=options.baseline,
        paper=options.paper,
        standings=None if options.standings is None else Path(options.standings),
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
