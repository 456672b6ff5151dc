"""The plots and numbers of docs/diagnostics.md: a tiny Qwen3-MoE is trained by a plain transformers loop and watched from outside.

    python -m tools.diagnostics_page docs/diagnostics

The task is to write two digits with a given sum: "07=" may be answered by 0+7, 1+6, ... so that right answers can differ. No
Megatron is imported. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from megatron_vp2o.diagnostics import observe, read_rollouts, rollout_metrics
from megatron_vp2o.diagnostics.rollouts import metrics_by_step
from megatron_vp2o.report.svg import Axis, Chart, Series
from tools.tiny_qwen3_moe import tiny_config

CHARACTERS = "0123456789+=\n"
SEED, STEPS, EVERY, ROWS, SAMPLES = 1, 400, 20, 64, 16
COLOURS = ("#0b5c95", "#c2570c", "#1a7340", "#7a3e9d")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#5a6673}text.label{fill:#1b2530}.grid{stroke:#e8ecef}.axis{stroke:#98a3ae}"
    ".line{stroke-width:2.2;stroke-linejoin:round}circle{stroke:#fff;stroke-width:1.2}"
)


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def batch(generator: torch.Generator) -> Tensor:
    """[ROWS, 7]: a sum of two digits, and one of the ways to write it."""
    digits = torch.randint(10, (ROWS, 2), generator=generator).tolist()
    return torch.tensor([encode(f"{a + b:02d}={a}+{b}\n") for a, b in digits])


def build(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(SEED)
    config = tiny_config(len(CHARACTERS), moe_intermediate_size=48, max_position_embeddings=32)
    return Qwen3MoeForCausalLM(config).to(dtype)


@torch.no_grad()
def logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Of each token of the answers, float32 [rows, 4]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float().log_softmax(-1)
    return logits.gather(2, tokens[:, 1:, None])[..., 0][:, 2:]


@torch.no_grad()
def rollouts(model: Any, engine: Any, step: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """SAMPLES answers to each of the 19 sums, drawn by `engine` (the same weights in bfloat16), graded, as lines of a file."""
    prompts = torch.tensor([encode(f"{total:02d}=") for total in range(19)]).repeat_interleave(SAMPLES, dim=0)
    tokens = prompts
    for _ in range(4):
        logits = engine(input_ids=tokens, use_cache=False).logits[:, -1].float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    drawn, again = logprobs(engine, tokens), logprobs(model, tokens)
    lines = []
    for row, engine_row, learner_row in zip(tokens.tolist(), drawn.tolist(), again.tolist(), strict=True):
        total, _, answer = "".join(CHARACTERS[i] for i in row).partition("=")
        parts = answer.strip("\n").split("+")
        right = answer.endswith("\n") and len(parts) == 2 and all(len(p) == 1 and p.isdigit() for p in parts)
        right = right and sum(map(int, parts)) == int(total)
        lines.append(
            {
                "step": step,
                "input": total,
                "output": answer,
                "score": float(right),
                "log_probs": learner_row,
                "rollout_log_probs": engine_row,
            }
        )
    return lines


def train(folder: Path) -> tuple[list[tuple[int, dict[str, float]]], Any]:
    """Train, watch, and write `rollouts.jsonl`. Returns the metrics by step, and the last report."""
    model, generator = build(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    metrics: list[tuple[int, dict[str, float]]] = []
    report: Any = None
    with observe(model) as seen, (folder / "rollouts.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, STEPS + 1):
            tokens = batch(generator)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 or step % EVERY == 0:
                report = seen.take()
                metrics.append((step, report.metrics))
            if step == 1 or step % (5 * EVERY) == 0:
                engine = build(torch.bfloat16)
                engine.load_state_dict(model.state_dict())
                for line in rollouts(model, engine, step, generator):
                    file.write(json.dumps(line) + "\n")
                seen.take(prototypes=False)  # what was seen while drawing
    return metrics, report


def chart(title: str, axis: Axis, lines: dict[str, list[tuple[int, float]]]) -> str:
    """A line chart as a file of its own: the report's, with its style and legend inside."""
    series = [Series(name, colour, points) for (name, points), colour in zip(lines.items(), COLOURS, strict=False)]
    figure = Chart(title, "", Axis("step", whole=True), axis, series).html()
    body = figure[figure.rindex("<svg viewBox") : figure.rindex("</svg>")]
    legend = "".join(
        f'<text x="{60 + 150 * i}" y="-8" style="fill:{line.colour};font-weight:600">{escape(line.name)}</text>'
        for i, line in enumerate(series)
    )
    body = body.replace('viewBox="0 0 520 264"', 'xmlns="http://www.w3.org/2000/svg" viewBox="-4 -28 536 300"', 1)
    head, _, rest = body.partition(">")
    return f'{head}><rect x="-4" y="-28" width="536" height="300" fill="#fff"/><style>{STYLE}</style>{legend}{rest}</svg>\n'


def heat_map(title: str, values_EE: Tensor) -> str:
    """A matrix of shares between 0 and its maximum off the diagonal, darker for more; each cell says its number."""
    size, cell = len(values_EE), 34
    off = values_EE.clone().fill_diagonal_(0.0)
    most = max(off.max().item(), 1e-9)
    width, height = 60 + cell * size, 76 + cell * size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<style>{STYLE}.n{{font-size:10px}}</style><rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="label" x="8" y="20">{escape(title)}</text>',
    ]
    for i in range(size):
        parts.append(f'<text x="{58 + cell * i}" y="44" text-anchor="middle">{i}</text>')
        parts.append(f'<text x="34" y="{74 + cell * i}" text-anchor="end">{i}</text>')
        for j in range(size):
            share = values_EE[i, j].item()
            strength = min(share / most, 1.0)
            fill = "#eef1f4" if i == j else f"rgba(11,92,149,{0.04 + 0.9 * strength:.3f})"
            colour = "#fff" if i != j and strength > 0.55 else "#1b2530"
            x, y = 42 + cell * j, 52 + cell * i
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" fill="{fill}"/>')
            parts.append(
                f'<text class="n" x="{x + cell / 2 - 1:.0f}" y="{y + 20}" text-anchor="middle" style="fill:{colour}">'
                f"{share:.2f}</text>"
            )
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    metrics, report = train(folder)

    def line(name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in metrics]

    plots = {
        "routing": chart(
            "Router",
            Axis("nats; share", zero=True),
            {n: line(f"moe/{n}") for n in ("router_entropy", "effective_experts")},
        ),
        "overlap": chart(
            "Overlap",
            Axis("mean squared cosine", zero=True),
            {"experts' outputs": line("moe/output_overlap"), "prototypes": line("stein/prototype_overlap")},
        ),
    }
    groups = read_rollouts(folder / "rollouts.jsonl")
    by_step = metrics_by_step(groups)
    plots["answers"] = chart(
        "Answers",
        Axis("distinct right answers; share right", zero=True),
        {
            "distinct": [(step, values["rollout/distinct"]) for step, values in by_step.items()],
            "pass rate": [(step, values["rollout/pass_rate"]) for step, values in by_step.items()],
        },
    )
    for layer, scores_EE in zip(("first", "second"), report.scores_LEE, strict=True):
        plots[f"coactivation_{layer}"] = heat_map(f"C of the {layer} layer", scores_EE)
    for name, text in plots.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    last = [group for group in groups if group.step == STEPS]
    (folder / "rollouts.jsonl").unlink()
    numbers = {"model": report.metrics, "rollouts": rollout_metrics(last)}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
