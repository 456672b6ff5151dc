"""Save and resume: model, optimizer, schedule, random numbers, actor and trainer state, in Megatron's distributed format.

`folder.py` has the layout on disk, and what makes a save all or nothing. Each phase that can fail on one rank
ends with the ranks telling each other, so that an error is everybody's and no rank waits for one that gave up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_vp2o.config.export import plain
from megatron_vp2o.errors import CheckpointError, DeadRunError
from megatron_vp2o.hf.settings import ARCHITECTURE, LATER, WITHOUT_WEIGHTS, YARN
from megatron_vp2o.megatron.actor.generation import MegatronEngine
from megatron_vp2o.megatron.checkpoint import folder as files
from megatron_vp2o.megatron.checkpoint.folder import latest, resolve
from megatron_vp2o.megatron.checkpoint.random_numbers import rng_state, set_rng_state
from megatron_vp2o.megatron.checkpoint.tensors import read_tensors, together, write_tensors
from megatron_vp2o.megatron.control.trust_region import TrustRegion
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.model.build import ACTIVATIONS
from megatron_vp2o.megatron.platform.compat import megatron_version
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes
from megatron_vp2o.megatron.stein.transform import SteinTransform
from megatron_vp2o.parallel.groups import Groups

__all__ = ["MegatronCheckpointer", "latest", "load_weights", "resolve"]

MODEL, OPTIMIZER, ACTOR, RNG, SCHEDULE, ANCHOR = ("model", "optimizer", "actor", "rng", "schedule", "anchor")
STEIN = "stein"
"""Prototypes: of a run with the Stein transform, its monitor, or a trust region."""
COACTIVATION = "coactivation"
"""Moving averages of co-activation: what the transform and its monitor have besides."""

logger = logging.getLogger(__name__)

# Every parameter of the distributed optimizer in its own shape, so that any layout can load it.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

_ACTIVATION_NAMES = {function: name for name, function in ACTIVATIONS.items()}

# What tells one optimizer parameter group from another; the rest of a group is settings.
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_GROUP_STATE = ("params", "step")


class MegatronCheckpointer:
    """Saves to and loads from the `checkpoints` folder of a run. All methods are collective over the world.

    Args:
        folder: made on the first save.
        engine: its actor is saved while it is older than the learner; None if there is none.
        prototypes, stein: what the Stein transform and the trust region go on from; None if there is none.
        region: the trust region, whose anchor and counters go on; None if there is none.
        keep: newest checkpoints that are kept, at least 1.
        tokenizer_save: writes the tokenizer's files to a folder; called on one rank.
    """

    def __init__(
        self,
        folder: Path,
        policy: MegatronPolicy,
        engine: MegatronEngine | None,
        *,
        keep: int,
        tokenizer_save: Callable[[Path], None] | None,
        prototypes: ExpertPrototypes | None = None,
        stein: SteinTransform | None = None,
        region: TrustRegion | None = None,
    ) -> None:
        self.folder, self.policy, self.engine = folder, policy, engine
        self.prototypes, self.stein, self.region = prototypes, stein, region
        self.keep, self.tokenizer_save = keep, tokenizer_save
        self.groups = policy.groups

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step. It appears whole, or not at all.

        Args:
            state: the trainer's, as plain JSON values, equal on all ranks. With `actor_age` > 0 the actor's weights are
                saved, too, and `actor_version` says which they are.

        Raises:
            CheckpointError: it could not be written (on all ranks). What was there before is untouched.
            DeadRunError: a weight is not finite: nothing is written, and no older checkpoint deleted.
        """
        target = files.step_folder(self.folder, step)
        refuse_dead_weights(self.policy, self.folder, step)
        temporary = files.temporary_folder(target)
        try:
            with together(self.groups):
                if self.groups.rank == 0:
                    files.begin(target)
            parts = self._parts(state)
            write_tensors(self._tree(parts, loading=False), temporary, self.groups)
            with together(self.groups):
                if self.groups.rank == 0:
                    self._write_rest(temporary, state)
            described = self._describe(temporary)
            with together(self.groups):
                if self.groups.rank == 0:
                    files.write_manifest(temporary, self._manifest(step, parts, described))
                    files.publish(temporary, target, self.keep)
        except CheckpointError as error:
            if self.groups.rank == 0:
                _clear(temporary)
            before = latest(self.folder)
            kept = f"the run can go on from {before}" if before else "there is no older checkpoint"
            raise CheckpointError(f"{target} was not saved: {error}; {kept}, once the cause is mended") from error
        return target

    def _parts(self, state: dict[str, Any]) -> list[str]:
        parts = [MODEL, RNG]
        if self.policy.scheduler.num_steps > 0:  # before that, an optimizer has no state
            parts.append(OPTIMIZER)
        if self.engine is not None and state.get("actor_age", 0) > 0:
            parts.append(ACTOR)
        transformed = self.stein is not None and self.stein.steps > 0
        anchored = self.region is not None and self.region.ready
        if transformed or anchored:
            parts.append(STEIN)
        if transformed:
            parts.append(COACTIVATION)
        if anchored:
            parts.append(ANCHOR)
        return parts

    def _tree(self, parts: list[str], *, loading: bool) -> dict[str, Any]:
        """What is to be saved, or to be loaded into: Megatron's description of this rank's shards."""
        policy = self.policy
        if not loading:
            policy.gather_parameters()
        model = policy.model.sharded_state_dict()
        tree: dict[str, Any] = {MODEL: model}
        if OPTIMIZER in parts:
            tree[OPTIMIZER] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_SHARDING)
        if ACTOR in parts:
            assert self.engine is not None
            tree[ACTOR] = self.engine.actor.sharded_state_dict()
            add_prefix_for_sharding(tree[ACTOR], f"{ACTOR}.")
        if STEIN in parts:
            assert self.prototypes is not None
            tree[STEIN] = self.prototypes.sharded_state_dict(loading=loading)
        if COACTIVATION in parts:
            assert self.stein is not None
            tree[STEIN] |= self.stein.sharded_state_dict(loading=loading)
        if ANCHOR in parts:
            assert self.region is not None
            tree[ANCHOR] = self.region.sharded_state_dict(loading=loading)
        if RNG in parts:
            size, rank = self.groups.world_size, self.groups.rank
            tree[RNG] = ShardedObject(RNG, None if loading else rng_state(), (size,), (rank,))
        if not loading:
            tree[SCHEDULE] = {
                "num_steps": policy.scheduler.num_steps,
                "stein_steps": 0 if self.stein is None else self.stein.steps,
                "prototypes_current": self.prototypes is not None and self.prototypes.current,
                "region": {} if self.region is None else self.region.counters(),
                "orthogonality_first": None if policy.orthogonality is None else policy.orthogonality.first,
            }
        return tree

    def _write_rest(self, temporary: Path, state: dict[str, Any]) -> None:
        if self.tokenizer_save is not None:
            self.tokenizer_save(temporary)
        files.write_json(temporary / files.STATE, state)

    def _describe(self, temporary: Path) -> dict[str, dict[str, int]]:
        """Size and checksum of every file; each rank reads its share."""
        rank, size = self.groups.rank, self.groups.world_size
        mine: dict[str, dict[str, int]] = {}
        with together(self.groups):
            mine = {name: files.describe(temporary / name) for name in files.files_of(temporary)[rank::size]}
        shares: list[Any] = [mine] * size
        if size > 1:
            dist.all_gather_object(shares, mine, group=self.groups.world)
        return {name: entry for share in shares for name, entry in share.items()}

    def _manifest(self, step: int, parts: list[str], described: dict[str, dict[str, int]]) -> dict[str, Any]:
        return {
            "step": step,
            "parts": parts,
            "model": _architecture(self.policy),
            "optimizer": _optimizer_kind(self.policy),
            "layout": _layout(self.groups),
            "versions": {"megatron-core": str(megatron_version()), "torch": torch.__version__},
            "files": described,
        }

    def load(self, path: Path) -> dict[str, Any]:
        """Take up training where a checkpoint left it; under another layout, too. Returns the trainer's state.

        The learning-rate schedule and other optimizer settings stay those of the configuration; the checkpoint says how far
        they have come. Random-number states are taken only under the layout that they were saved from.

        Raises:
            CheckpointError: the checkpoint is damaged, of another model or another kind of optimizer (on all ranks).
                Nothing in memory has changed then, unless a file beyond CHECKSUM_LIMIT is damaged inside.
        """
        manifest = _check(path, self.policy)
        with together(self.groups):
            _same("optimizer", path, manifest["optimizer"], _optimizer_kind(self.policy))
            state = json.loads((path / files.STATE).read_text(encoding="utf-8"))
        absent = {
            ACTOR: self.engine is None,
            STEIN: self.prototypes is None,
            COACTIVATION: self.stein is None,
            ANCHOR: self.region is None,
        }
        saved = manifest["parts"]
        if manifest["format"] == 1 and STEIN in saved:  # which had both in one part
            saved = [*saved, COACTIVATION]
        parts = [part for part in saved if not absent.get(part, False)]
        if {"cp": 1} | manifest["layout"] != _layout(self.groups):  # older ones know no context parallelism
            parts.remove(RNG)
            if self.groups.rank == 0:
                logger.warning(
                    "%s was saved under another layout (%s there, %s here): the same batches follow, rounded otherwise, and "
                    "random-number states are not taken over",
                    path.name,
                    manifest["layout"],
                    _layout(self.groups),
                )
        loaded = read_tensors(self._tree(parts, loading=True), path, self.groups)
        self.policy.model.load_state_dict(loaded[MODEL])
        _refuse_dead(path, self.policy)
        self._load_optimizer(loaded)
        if ACTOR in parts:
            assert self.engine is not None
            self.engine.actor.load_state_dict(loaded[ACTOR])
            self.engine.version = state["actor_version"]
        if self.policy.orthogonality is not None:  # checkpoints before 2026-11-27 lack it: it is measured anew
            self.policy.orthogonality.first = loaded[SCHEDULE].get("orthogonality_first")
        if STEIN in parts:
            assert self.prototypes is not None
            current = loaded[SCHEDULE].get("prototypes_current", False)  # format 1 does not say
            self.prototypes.load_state_dict(loaded[STEIN], current=current)
        if STEIN in parts and self.stein is not None:
            steps, average = loaded[SCHEDULE]["stein_steps"], COACTIVATION in parts
            self.stein.load_sharded(loaded[STEIN], steps=steps, average=average)
        if ANCHOR in parts:
            assert self.region is not None
            self.region.load_state_dict(loaded[ANCHOR], loaded[SCHEDULE]["region"])
        elif self.region is not None and self.engine is not None:
            self.engine.version = -1  # makes the loop refresh the actors first, which sets the anchor
            if self.groups.rank == 0:
                logger.warning("%s has no anchor: the actors are refreshed before the next step", path.name)
        if RNG in parts:
            set_rng_state(loaded[RNG])
        return state

    def _load_optimizer(self, loaded: dict[str, Any]) -> None:
        optimizer, scheduler = self.policy.optimizer, self.policy.scheduler
        if OPTIMIZER in loaded:
            for inner, state in _pairs(optimizer, loaded[OPTIMIZER]):
                _keep_settings(inner, state)
            optimizer.load_state_dict(loaded[OPTIMIZER])
        else:
            optimizer.reload_model_params()
        scheduler.num_steps = 0
        scheduler.step(increment=loaded[SCHEDULE]["num_steps"])


def refuse_dead_weights(policy: MegatronPolicy, folder: Path, step: int) -> None:
    """Collective.

    Args:
        folder: of the run's checkpoints.

    Raises:
        DeadRunError: on all ranks, where a weight is not finite.
    """
    if policy.weights_finite():
        return
    before = latest(folder)
    kept = f"The newest checkpoint is {before}" if before else "There is no checkpoint"
    raise DeadRunError(
        f"the weights of step {step} are not finite, and no step can bring them back, so they are not saved. {kept}; lower "
        f"optimizer.lr={policy.peak_lr:g} and start again"
    )


def load_weights(path: Path, policy: MegatronPolicy) -> None:
    """Start from a checkpoint's weights, saved under any layout, precision and optimizer. Collective.

    Raises:
        CheckpointError: as `MegatronCheckpointer.load`, but for the optimizer; and for weights that are not finite.
    """
    load_model(path, policy)
    policy.optimizer.reload_model_params()  # where it has a float32 copy


def load_model(path: Path, policy: MegatronPolicy) -> None:
    """The same for a model without an optimizer."""
    _check(path, policy)
    loaded = read_tensors({MODEL: policy.model.sharded_state_dict()}, path, policy.groups)
    policy.model.load_state_dict(loaded[MODEL])
    _refuse_dead(path, policy)


def _refuse_dead(path: Path, policy: MegatronPolicy) -> None:
    """Raises CheckpointError on all ranks for weights that are not finite, which nothing can be trained from."""
    if not policy.weights_finite():
        raise CheckpointError(
            f"checkpoint {path} has weights that are not finite: the run that wrote it had diverged; choose an older "
            f"one{files.beside(path)}, or make it again with a lower learning rate"
        )


# --- optimizer --------------------------------------------------------------------------------------------------------


def _pairs(optimizer: Any, loaded: dict[Any, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each of Megatron's optimizers with its part of the loaded state."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [(chained[0], loaded)] if len(chained) == 1 else [(inner, loaded[i]) for i, inner in enumerate(chained)]


def _keep_settings(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Learning rates, betas and the like as configured now, in the place of the saved ones.

    megatron-core 0.19 otherwise refuses another learning rate (it counts as another group), and 0.16 takes the old.
    """
    groups = loaded["param_groups"] if "param_groups" in loaded else loaded["optimizer"]["param_groups"]
    own = {_group_key(group): group for group in optimizer.param_groups}
    for group in groups:
        settings = own.get(_group_key(group), {})
        group.update({key: value for key, value in settings.items() if key not in _GROUP_STATE})


def _group_key(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _GROUP_KEYS)


# --- what must fit ----------------------------------------------------------------------------------------------------


def _check(path: Path, policy: MegatronPolicy) -> dict[str, Any]:
    """The manifest of a whole checkpoint of this model. Raises CheckpointError on all ranks."""
    groups = policy.groups
    with together(groups):
        manifest = files.read_manifest(path)
        if absent := [name for name in files.SECTIONS if name not in manifest]:
            raise files.damaged(path, f"{files.MANIFEST} has no {absent[0]!r}")
        _same("model", path, manifest["model"], _architecture(policy))
        files.check_files(path, manifest, part=groups.rank, parts=groups.world_size)
    return manifest


def _same(what: str, path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    there = LATER | there if what == "model" else there
    unknown = {*WITHOUT_WEIGHTS, *YARN} - set(there)
    differing = [key for key in here if key not in unknown and there.get(key) != here[key]]
    if differing:
        values = ", ".join(f"{key} is {there.get(key)} there and {here[key]} here" for key in differing)
        fix = "use its settings" if what == "model" else "use its settings, or take only its weights (init_from)"
        raise CheckpointError(f"checkpoint {path} is of another {what} ({values}): {fix}, or another checkpoint")


def _architecture(policy: MegatronPolicy) -> dict[str, Any]:
    gpt = policy.model
    later = {name: plain(getattr(gpt.config, name, None)) for name in LATER}
    return (
        {name: getattr(gpt.config, name) for name in ARCHITECTURE}
        | later
        | {
            "position_embedding_type": gpt.position_embedding_type,
            "rotary_base": gpt.rotary_base,
            "share_embeddings_and_output_weights": gpt.share_embeddings_and_output_weights,
            "vocab_size": policy.model_vocab,
            "window_attn_skip_freq": gpt.config.window_attn_skip_freq,
            "activation_func": _ACTIVATION_NAMES[gpt.config.activation_func],
        }
        | {name: getattr(gpt.config, name) for name in YARN if gpt.position_embedding_type == "yarn"}
    )


def _optimizer_kind(policy: MegatronPolicy) -> dict[str, Any]:
    return {
        "parallel.distributed_optimizer": policy.ddp.ddp_config.use_distributed_optimizer,
        "model.precision": "bf16" if policy.model.config.bf16 else "fp32",
    }


def _layout(groups: Groups) -> dict[str, int]:
    sizes = {name: getattr(groups, name).size() for name in ("tp", "pp", "cp", "dp", "ep", "etp")}
    return {"world": groups.world_size, **sizes}


def _clear(temporary: Path) -> None:
    try:
        files.discard(temporary)
    except OSError as error:
        logger.warning("%s could not be removed: %s", temporary, error)
