"""The plug-in in verl's own trainers, on a CPU, from a built wheel: `make test-verl`. Skipped where verl is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killed import run_until
from tests.wheel import build_wheel, install_wheel

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed here (make test-verl)"),
]

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
ON = "+engine.override_mcore_model_config.vp2o.stein.enabled=True"
MONITOR = "+engine.override_mcore_model_config.vp2o.stein.monitor=True"
STEPS = 8
"""Of a run: verl_rows.py has 64 rows."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's wheel, built and installed beside verl in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder), folder / "site")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.hf.word_model import save

    folder = tmp_path_factory.mktemp("model")
    save(str(folder))
    return folder


def environment(site: Path, vendor: str | None = "vp2o", modules: str = "tests.plugins.verl_cpu") -> dict[str, str]:
    """The wheel first, so that the source tree gives `tests` only."""
    found = {
        **os.environ,
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "2000",
        "HF_HUB_OFFLINE": "1",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": modules,
    }
    found.pop("VERL_ENGINE_VENDOR", None)
    return found | ({} if vendor is None else {"VERL_ENGINE_VENDOR": vendor})


def run(command: list[str], site: Path, cwd: Path, *, timeout: float = 300, **kwargs: str | None) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(site, **kwargs),  # type: ignore[arg-type]
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def sft(model: Path, out: Path, *, ranks: int = 1) -> list[str]:
    """Overrides of verl's SFT trainers for the tiny model on a CPU."""
    transformer = "engine.override_transformer_config"
    off = (
        "persist_layer_norm",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "moe_grouped_gemm",
        "moe_permute_fusion",
    )
    return [
        "engine=megatron",
        "optim=megatron",
        f"model.path={model}",
        "model.use_remove_padding=False",
        "+model.override_config.attn_implementation=eager",
        "engine.vanilla_mbridge=True",
        f"engine.expert_model_parallel_size={ranks}",
        f"++{transformer}.use_cpu_initialization=True",
        f"{transformer}.attention_backend=unfused",
        *(f"++{transformer}.{name}=False" for name in off),
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=2",
        "data.use_dynamic_bsz=False",
        "data.num_workers=0",
        f"data.custom_cls.path={HERE / 'verl_rows.py'}",
        "data.custom_cls.name=Count",
        "data.train_files=none",
        "optim.lr=3e-3",
        "optim.lr_warmup_steps=0",
        "trainer.total_epochs=1",
        "trainer.logger=[console]",
        "trainer.device=cpu",
        f"trainer.default_local_dir={out}",
        "trainer.resume_mode=disable",
    ]


def torchrun(ranks: int, module: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]


def values(output: str, name: str) -> list[float]:
    """A metric of verl's console logger, line by line."""
    return [float(value) for value in re.findall(rf"{re.escape(name)}:\[?(?:np\.float64\()?(-?[\d.e+-]+)", output)]


Straight = Callable[[int], tuple[Path, str]]


@pytest.fixture(scope="session")
def straight(site: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Eight steps of verl's SFT trainer with the transform on, for a number of ranks: the checkpoints' folder, what it printed."""
    kept: dict[int, tuple[Path, str]] = {}

    def result(ranks: int) -> tuple[Path, str]:
        if ranks not in kept:
            folder = tmp_path_factory.mktemp("straight")
            status, output = run(saving(model, folder / "ck", ranks), site, folder)
            assert status == 0, output[-4000:]
            kept[ranks] = folder / "ck", output
        return kept[ranks]

    return result


def saving(model: Path, out: Path, ranks: int) -> list[str]:
    command = [*torchrun(ranks, "verl.trainer.sft_trainer"), *sft(model, out, ranks=ranks), ON]
    return [*command, f"trainer.save_freq={STEPS // 2}"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_verls_sft_trainer(site: Path, straight: Straight, tmp_path: Path, ranks: int) -> None:
    _, output = straight(ranks)
    active = [line for line in output.splitlines() if "is active in verl" in line]
    assert len(active) == 1
    assert "Stein transform of expert gradients (eta 0.01), 2 MoE layers" in active[0]
    learns_and_logs(output)
    assert (
        str(site)
        in subprocess.run(
            [sys.executable, "-c", "import megatron_vp2o; print(megatron_vp2o.__file__)"],
            cwd=tmp_path,
            env=environment(site),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def learns_and_logs(output: str) -> None:
    losses = values(output, "train/loss")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    for name in ("vp2o/moe/router_entropy", "vp2o/stein/prototype_overlap", "vp2o/stein/self_weight"):
        assert len(values(output, name)) == STEPS, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_verls_sft_trainer_under_ray(site: Path, model: Path, tmp_path: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "verl.trainer.sft_trainer_ray", *sft(model, tmp_path / "ck", ranks=ranks), ON]
    status, output = run(
        [*command, f"trainer.n_gpus_per_node={ranks}", "trainer.nnodes=1"], site, tmp_path, timeout=400
    )
    assert status == 0, output[-4000:]
    assert output.count("is active in verl") >= 1  # Ray repeats what an actor prints
    learns_and_logs(output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_with_its_state(
    site: Path, model: Path, straight: Straight, tmp_path: Path, ranks: int
) -> None:
    """SIGKILL at step 6, with a checkpoint of step 4: started again, verl ends with the weights of the run that was left alone."""
    command = [*saving(model, tmp_path / "ck", ranks), "trainer.resume_mode=auto"]
    killed = run_until("step:6 -", command, cwd=tmp_path, env=environment(site))
    assert "step:8 -" not in killed
    cold = tmp_path / "cold"
    shutil.copytree(tmp_path / "ck", cold)
    status, output = run(command, site, tmp_path)
    assert status == 0, output[-4000:]
    assert len(values(output, "train/loss")) == STEPS // 2 and "step:5 -" in output
    folder, _ = straight(ranks)
    expected = saved_weights(folder / f"global_step_{STEPS}")
    assert len(expected) > 20
    assert saved_weights(tmp_path / "ck" / f"global_step_{STEPS}") == expected
    first, again = (stein_state(root / f"global_step_{STEPS}") for root in (folder, tmp_path / "ck"))
    assert first["steps"] == again["steps"] == STEPS
    for layer, state in first["layers"].items():
        for name, value in state.items():
            assert torch.equal(value, again["layers"][layer][name]), (layer, name)
    if ranks > 1:
        return
    for path in cold.rglob("vp2o_stein.pt.*"):
        path.unlink()
    status, output = run([*command, f"trainer.default_local_dir={cold}"], site, tmp_path)
    assert status == 0, output[-4000:]
    assert "has no state of the Stein transform" in output
    assert saved_weights(cold / f"global_step_{STEPS}") != expected


def stein_state(folder: Path) -> Any:
    (path,) = folder.rglob("vp2o_stein.pt.0")
    return torch.load(path, weights_only=True)


def saved_weights(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {name: value.float().numpy().tobytes() for name, value in load_file(path).items()}
    return found


def test_off_is_off_to_the_bit(site: Path, model: Path, straight: Straight, tmp_path: Path) -> None:
    results = {}
    for name, vendor, further in (
        ("without", None, []),
        ("off", "vp2o", []),
        ("monitor", "vp2o", [MONITOR]),
    ):
        command = [*torchrun(1, "verl.trainer.sft_trainer"), *sft(model, tmp_path / name), *further]
        status, output = run(command, site, tmp_path, vendor=vendor)
        assert status == 0, output[-4000:]
        assert ("switched off" in output) == (name == "off")
        results[name] = (saved_weights(tmp_path / name), values(output, "train/loss"))
    assert len(results["without"][0]) > 20
    assert results["off"] == results["without"]
    assert results["monitor"] == results["without"]
    folder, output = straight(1)
    assert saved_weights(folder / f"global_step_{STEPS}") != results["without"][0]
    assert values(output, "train/loss")[0] == results["without"][1][0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_the_projects_own_trainer_and_resume(
    site: Path, model: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights after five steps, metrics of each (which also says that padding does not count), and a resumed run's."""
    for name, value in (("MODEL", model), ("CHECKPOINT", tmp_path / "ck"), ("RESULT", tmp_path / "result")):
        monkeypatch.setenv(name, str(value))
    status, output = run(torchrun(ranks, "tests.plugins.verl_equal_job"), site, tmp_path)
    assert status == 0, output[-4000:]
    for rank in range(ranks):
        found = json.loads((tmp_path / f"result.{rank}").read_text())
        assert found["moved"] > 1e-3
        assert found["own"] < 1e-5
        assert found["resumed"] < 1e-6
        assert found["state"] < 1e-6 and found["steps"] == 5
        for host, own in zip(found["metrics"], found["own_metrics"], strict=True):
            assert host.keys() == own.keys()
            for metric, value in own.items():
                assert host[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric


def test_statistics_are_those_of_the_routes_that_verl_replays(
    site: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", str(model))
    status, output = run(torchrun(1, "tests.plugins.verl_replay_job"), site, tmp_path)
    assert status == 0 and "replayed" in output, output[-4000:]


BROKEN = """
import sys
class Break:
    def find_spec(self, name, path=None, target=None):
        if name == "megatron_vp2o.plugins.verl.engine":
            raise RuntimeError("broken on purpose")
sys.meta_path.insert(0, Break())
import tests.plugins.verl_cpu
"""
TAKEN = """
import tests.plugins.verl_cpu
from verl.workers.engine import BaseEngine, EngineRegistry
@EngineRegistry.register(model_type="language_model", backend="megatron", device=["cpu"], vendor="vp2o")
class Other(BaseEngine):
    pass
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BROKEN, r"RuntimeError: broken on purpose"),
        (TAKEN, r"an engine is registered in verl already for vendor 'vp2o'"),
    ],
    ids=["exception at import", "registered twice"],
)
def test_a_broken_plug_in_ends_the_run_with_one_line(site: Path, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "before.py").write_text(source)
    environment_ = environment(site, modules="before")
    environment_["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import verl; print('went on')"],
        cwd=tmp_path,
        env=environment_,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "went on" not in done.stdout
    said = [line for line in done.stderr.splitlines() if "megatron-vp2o" in line]
    assert len(said) == 1 and re.search(message, said[0]), done.stderr[-2000:]


def test_another_backend_and_an_untested_version_are_named(site: Path, tmp_path: Path) -> None:
    code = """
import megatron_vp2o.plugins.versions as versions
versions.TESTED["verl"] = ("0.1",)
import verl
from verl.workers.engine import EngineRegistry
from megatron_vp2o.plugins.verl.registration import register
register()  # a second time: nothing
try:
    EngineRegistry.new("language_model", "fsdp")
except ValueError as error:
    print("refused:", error)
print(EngineRegistry.get_engine_cls("language_model", "megatron").__name__)
"""
    status, output = run([sys.executable, "-c", code], site, tmp_path)
    assert status == 0, output[-3000:]
    assert output.count("was tested with verl 0.1, and this is") == 1
    assert "refused: VERL_ENGINE_VENDOR=vp2o and strategy=fsdp" in output
    assert "VP2OEngine" in output


def test_masks_are_those_that_verl_pads_by(site: Path, tmp_path: Path) -> None:
    """Against verl's own functions that pad and pack, for random lengths and alignments."""
    code = """
import torch
from unittest import mock
import verl
import verl.models.mcore.util as util
from megatron_vp2o.plugins.verl.engine import packed_mask, padded_mask
generator = torch.Generator().manual_seed(7)
checked = 0
for draw in range(40):
    lengths = torch.randint(1, 20, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator)
    align = int(torch.randint(1, 5, (1,), generator=generator))
    rows = torch.nested.as_nested_tensor([torch.ones(n, dtype=torch.long) for n in lengths.tolist()], layout=torch.jagged)
    with mock.patch.object(util.mpu, "get_tensor_model_parallel_world_size", lambda: align), \\
         mock.patch.object(util.mpu, "get_context_parallel_world_size", lambda: 1), \\
         mock.patch.object(util.mpu, "get_context_parallel_rank", lambda: 0):
        longest = int(lengths.max()) + draw % 3
        ids, mask, _ = util.preprocess_bshd_engine(rows, forced_max_seqlen=longest)
        assert torch.equal(padded_mask(lengths, align=align, longest=longest), mask.t().flatten())
        bucket = 32 if draw % 2 else None
        packed = util.preprocess_thd_engine(rows, pad_to_length_bucket=bucket)[0].flatten()
        assert torch.equal(packed_mask(lengths, align=align, bucket=bucket), packed == 1), (lengths, align, bucket)
    checked += int((packed == 0).sum())
assert checked > 50
print("checked", checked)
"""
    status, output = run([sys.executable, "-c", code], site, tmp_path)
    assert status == 0 and "checked" in output, output[-3000:]


def test_loss_and_advantages(site: Path, tmp_path: Path) -> None:
    """verl finds them by name; the loss is the unclipped surrogate, the advantages those of core/."""
    code = """
import numpy, torch
import verl
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from megatron_vp2o.core.advantages import group_relative_advantages, maxrl_advantages, pass_at_k_advantages, w_reinforce_advantages
g = torch.Generator().manual_seed(0)
old, new, adv = (torch.randn(4, 6, generator=g) for _ in range(3))
new.requires_grad_(True)
mask = torch.rand(4, 6, generator=g) < 0.7
old[~mask] = float("nan")
vp2o = get_policy_loss_fn("vp2o")
loss, metrics = vp2o(old_log_prob=old, log_prob=new, advantages=adv, response_mask=mask, loss_agg_mode="token-mean")
loss.backward()
total = sum(-(new[i, j] - old[i, j]).exp().item() * adv[i, j].item() for i in range(4) for j in range(6) if mask[i, j])
assert abs(loss.item() - total / mask.sum().item()) < 1e-5, (loss, total)
assert new.grad.isfinite().all() and (new.grad[~mask] == 0).all() and (new.grad[mask] != 0).all()
right = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
uid = numpy.array(list("abcabcabcabc"))
order = torch.tensor([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
token_mask = torch.ones(12, 3)
rewards = torch.zeros(12, 3); rewards[:, -1] = right
grouped = right[order]
expected = {
    "vp2o_group_relative": group_relative_advantages(grouped, normalise_by_std=True, epsilon=1e-6),
    "vp2o_w_reinforce": w_reinforce_advantages(grouped, grouped > 0.5, positive_weight=0.1),
    "vp2o_pass_at_k": pass_at_k_advantages(grouped > 0.5, k=2),
    "vp2o_maxrl": maxrl_advantages(grouped, epsilon=1e-6),
}
config = {"vp2o_pass_k": 2}
for name, value in expected.items():
    found, _ = get_adv_estimator_fn(name)(token_level_rewards=rewards, response_mask=token_mask, config=config, index=uid)
    assert torch.allclose(found[order][..., 0], value.float(), atol=1e-6), name
    assert value.abs().max() > 0
try:
    uneven = numpy.array(list("aabbbbbbbbbb"))
    get_adv_estimator_fn("vp2o_maxrl")(token_level_rewards=rewards, response_mask=token_mask, index=uneven)
except ValueError as error:
    print("refused:", error)
"""
    status, output = run([sys.executable, "-c", code], site, tmp_path)
    assert status == 0, output[-3000:]
    assert "refused: groups of [2, 10] responses" in output
