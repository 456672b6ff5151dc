"""One run from its configuration to its exit status: builds the collaborators and hands them to a trainer.

With `train.py` the composition root: nothing imports it, and it may import everything.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()  # before anything else imports megatron.core; does nothing where there is CUDA

from megatron_vp2o.config.continuity import changes  # noqa: E402
from megatron_vp2o.config.names import CHECKPOINTS  # noqa: E402
from megatron_vp2o.config.schema import (  # noqa: E402
    ControlMode,
    DataSource,
    GRPOConfig,
    KLReference,
    Resume,
    RouterReplay,
    SupervisedConfig,
    TrainConfig,
    VP2OConfig,
)
from megatron_vp2o.config.store import as_plain, save_config  # noqa: E402
from megatron_vp2o.config.validate import compares_rollouts, validate, validate_prompts, validate_vocabulary  # noqa: E402
from megatron_vp2o.config.validate_algorithm import optimizer_steps  # noqa: E402
from megatron_vp2o.cores import local_size  # noqa: E402
from megatron_vp2o.data.documents import Documents, JsonlText, TaskDemonstrations  # noqa: E402
from megatron_vp2o.data.packing import PackedBatches  # noqa: E402
from megatron_vp2o.evaluation.data import Questions  # noqa: E402
from megatron_vp2o.evaluation.during import Suites, asked_during, opened  # noqa: E402
from megatron_vp2o.evaluation.grading import Grading  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.checkpoint import checkpointer as checkpoint  # noqa: E402
from megatron_vp2o.megatron.checkpoint.identity import weights_identity  # noqa: E402
from megatron_vp2o.megatron.control.trust_region import TrustRegion  # noqa: E402
from megatron_vp2o.megatron.hf import start as hf_start  # noqa: E402
from megatron_vp2o.megatron.indexed import IndexedDocuments  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.parallel import failure  # noqa: E402
from megatron_vp2o.parallel.groups import Groups, first_rank_says  # noqa: E402
from megatron_vp2o.rewards import open_reward  # noqa: E402
from megatron_vp2o.rl.control import BudgetMeter, PlainSteps  # noqa: E402
from megatron_vp2o.rl.drift import SampledDrift  # noqa: E402
from megatron_vp2o.rl.evaluate import evaluate_splits  # noqa: E402
from megatron_vp2o.rl.interfaces import (  # noqa: E402  # noqa: E402
    GradientTransform,
    RefreshPolicy,
    Restorable,
    Reward,
    RolloutEngine,
    Stepper,
    Task,
    Tokenizer,
)
from megatron_vp2o.rl.loop import DATA, REFERENCE, ROWS, TrainingLoop, no_transform  # noqa: E402
from megatron_vp2o.rl.mismatch import MismatchControl  # noqa: E402
from megatron_vp2o.rl.objectives import OnRollouts, policy_objective  # noqa: E402
from megatron_vp2o.rl.refresh import EveryBatches, WhenSpent  # noqa: E402
from megatron_vp2o.rl.supervised import SupervisedTrainer, validation_loss  # noqa: E402
from megatron_vp2o.rl.trainer import RLTrainer  # noqa: E402
from megatron_vp2o.rl.types import Split  # noqa: E402
from megatron_vp2o.serving import rollout_engine  # noqa: E402
from megatron_vp2o.tasks import make_task  # noqa: E402
from megatron_vp2o.tasks.rows import RowsTask  # noqa: E402
from megatron_vp2o.tasks.tokenizer import load_tokenizer  # noqa: E402
from megatron_vp2o.tracking.samples import RunSamples  # noqa: E402
from megatron_vp2o.tracking.sink import RunSink  # noqa: E402

LOGGED_PER_CONTEXT = 4
"""Contexts that actors log for each one that the trust region looks at: sequences end early, and groups are filtered out."""

ROWS_FILE = "rows.json"  # in the run folder: what was read, and what was left out

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The collaborators of one run."""

    config: TrainConfig
    task: Task
    tokenizer: Tokenizer
    groups: Groups
    sink: RunSink
    samples: RunSamples
    policy: MegatronPolicy
    engine: MegatronEngine
    """Holds the actor's weights on the learner's ranks."""
    actors: RolloutEngine
    """Generates: `engine`, or servers with its weights."""
    checkpointer: checkpoint.MegatronCheckpointer
    transform: GradientTransform
    stepper: Stepper


def train(config: TrainConfig) -> int:
    """Run to the end, or to a signal's early one. Returns the exit status.

    Raises:
        UserError: for what the configuration's own validation could not see: prompts, checkpoints, data.

    With several ranks call it inside of `failure.ends_all_ranks`: after an exception no rank can go on.
    """
    world.set_threads(config.threads)
    hf_start.check_model(config)
    config = hf_start.with_own_tokenizer(config)
    asked = asked_during(config)
    with open_reward(config.reward) as reward, opened(config, asked, world.environment_rank()) as grading:
        return _train(config, reward, asked, grading)


def _train(config: TrainConfig, reward: Reward | None, asked: list[Questions], grading: Grading) -> int:
    room = config.model.max_sequence_length - config.rollout.sampling.max_new_tokens
    task = make_task(config.task, progress=world.environment_rank() == 0, reward=reward, room=room)
    validate_prompts(config, task.max_prompt_tokens)
    validate_vocabulary(config, _tokenizer(config, task).vocab_size)
    with world.joined(config.parallel, config.seed) as groups:
        validate(
            config,
            groups.world_size,
            cuda_devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            local_world_size=local_size(),
        )
        run = _assemble(config, task, groups, [questions.benchmark.name for questions in asked])
        trainer = _trainer(run)
        if asked:
            trainer.suites = Suites(config, asked, grading, engine=run.engine, tokenizer=run.tokenizer, groups=groups)
        _resume(run, trainer)
        if groups.rank == 0:
            save_config(config, config.run_dir)
            _report_rows(config, task)
        with run.sink, failure.tells_all_ranks(), closing(run.actors):  # closing the sink may take its time
            status = trainer.run()
            if status == 0:  # where the last step was not saved, nobody has looked at its weights yet
                checkpoint.refuse_dead_weights(run.policy, run.checkpointer.folder, trainer.progress.step)
            if status == 0 and config.checkpoint.export_hf:
                _export(run)
    return status


def _export(run: Run) -> None:
    target = Path(run.config.run_dir) / "hf"
    with run.sink.phase(f"exporting to {target}"):
        hf_start.export(run.config, run.policy, run.tokenizer, run.groups, target)


def _assemble(config: TrainConfig, task: Task, groups: Groups, suites: list[str]) -> Run:
    tokenizer = _tokenizer(config, task)
    policy = MegatronPolicy(
        config, groups, vocab_size=tokenizer.vocab_size, optimizer_steps=optimizer_steps(config.algorithm)
    )
    hf_start.start(config, policy, tokenizer, groups)
    engine = MegatronEngine(config, policy, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    if config.rollout.router_replay is RouterReplay.R3:
        engine.record_routes()
    actors = rollout_engine(config, policy, engine, tokenizer, groups)
    algorithm = config.algorithm
    bounded = isinstance(algorithm, VP2OConfig) and algorithm.trust_region.mode is not ControlMode.off
    observed = algorithm.stein.enabled or algorithm.stein.monitor
    prototypes = ExpertPrototypes(policy.ddp, algorithm.stein, groups) if observed or bounded else None
    stein = SteinTransform(prototypes, optimizer=policy.optimizer) if prototypes is not None and observed else None
    region = None
    if isinstance(algorithm, VP2OConfig) and bounded and prototypes is not None:
        region = TrustRegion(
            policy, prototypes, algorithm.trust_region, *_present(stein), drift=_drift(algorithm, policy, groups)
        )
        # All of a rollout batch's contexts, so that each of its optimizer steps finds enough among its own sequences.
        updates = algorithm.minibatches * algorithm.epochs
        engine.log_gates(LOGGED_PER_CONTEXT * updates * algorithm.trust_region.contexts_per_rank)
    folder = Path(config.run_dir)
    checkpointer = checkpoint.MegatronCheckpointer(
        folder / CHECKPOINTS,
        policy,
        engine,
        keep=config.checkpoint.keep,
        tokenizer_save=tokenizer.save,
        prototypes=prototypes,
        stein=stein,
        region=region,
    )
    return Run(
        config,
        task,
        tokenizer,
        groups,
        RunSink(config, as_plain(config), rank=groups.rank, suites=suites),
        RunSamples(config.logging, config.run_dir, groups.rank),
        policy,
        engine,
        actors,
        checkpointer,
        no_transform if stein is None else stein.transform_gradients,
        region or PlainSteps(policy, *_present(prototypes, stein)),
    )


def _drift(algorithm: VP2OConfig, policy: MegatronPolicy, groups: Groups) -> SampledDrift | None:
    """What measures the policy's drift; None where nothing is to be scored for it."""
    share = algorithm.trust_region.drift_share
    return SampledDrift(policy, groups, share=share, micro_batch_size=algorithm.micro_batch_size) if share else None


def _present(*parts: Restorable | None) -> list[Restorable]:
    return [part for part in parts if part is not None]


def _tokenizer(config: TrainConfig, task: Task) -> Tokenizer:
    algorithm = config.algorithm
    if isinstance(algorithm, SupervisedConfig) and algorithm.data.tokenizer is not None:
        return load_tokenizer(Path(algorithm.data.tokenizer))
    return task.tokenizer


def _trainer(run: Run) -> TrainingLoop:
    if isinstance(run.config.algorithm, SupervisedConfig):
        trainer: TrainingLoop = _supervised(run, run.config.algorithm)
    else:
        assert isinstance(run.config.algorithm, GRPOConfig)
        trainer = _reinforcement(run, run.config.algorithm)
    if isinstance(run.task, RowsTask):
        trainer.identities[ROWS] = run.task.fingerprint
    return trainer


def _supervised(run: Run, settings: SupervisedConfig) -> SupervisedTrainer:
    config, groups = run.config, run.groups

    def batches(documents: Documents) -> PackedBatches:
        return PackedBatches(
            documents,
            sequence_length=settings.sequence_length or config.model.max_sequence_length,
            rows=settings.global_batch_size,
            pack=settings.data.pack,
            seed=config.seed,
            pad_id=run.tokenizer.pad_id,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            vocab_size=run.tokenizer.vocab_size,
        )

    def held_out(final: bool) -> dict[str, float]:
        if settings.data.source is not DataSource.task:
            return {}
        unseen = batches(TaskDemonstrations(run.task, Split.validation, config.seed))
        loss = validation_loss(run.policy, unseen, settings.micro_batch_size, groups)
        return {
            "supervised/validation_loss": loss,
            **evaluate_splits(run.engine, run.task, config, groups, final=final),
        }

    documents = _documents(run, settings)
    trainer = SupervisedTrainer(
        config,
        groups,
        run.sink,
        run.checkpointer,
        policy=run.policy,
        batches=batches(documents),
        held_out=held_out,
        transform=run.transform,
        stepper=run.stepper,
    )
    if identity := documents.identity():
        trainer.identities[DATA] = identity
    return trainer


def _documents(run: Run, settings: SupervisedConfig) -> Documents:
    data = settings.data
    if data.source is DataSource.task:
        return TaskDemonstrations(run.task, Split.train, run.config.seed)
    assert data.path is not None
    if data.source is DataSource.jsonl:
        return JsonlText(data.path, data.text_field, run.tokenizer)
    return IndexedDocuments(data.path)


def _reinforcement(run: Run, settings: GRPOConfig) -> RLTrainer:
    config = run.config
    reference = None
    if settings.kl_reference is KLReference.initial:
        # The policy holds the weights that the run starts from: a resumed run's checkpoint is loaded after this.
        reference = MegatronEngine(config, run.policy, eos_ids=run.tokenizer.eos_ids, pad_id=run.tokenizer.pad_id)
        reference.refresh(0)
    vp2o = settings if isinstance(settings, VP2OConfig) else None
    metered = vp2o is not None and vp2o.budget.mode is not ControlMode.off
    trainer = RLTrainer(
        config,
        run.groups,
        run.sink,
        run.checkpointer,
        task=run.task,
        policy=run.policy,
        engine=run.actors,
        objective=OnRollouts(policy_objective(settings)),
        refresh=_refresh_policy(config, vp2o),
        reference=reference,
        transform=run.transform,
        stepper=run.stepper,
        meter=BudgetMeter(vp2o.budget, run.groups) if vp2o is not None and metered else None,
        samples=run.samples,
        mismatch=MismatchControl(settings.mismatch, run.groups) if compares_rollouts(config) else None,
    )
    if reference is not None:
        trainer.identities[REFERENCE] = weights_identity(reference.actor, run.groups, run.policy.model_vocab)
    return trainer


def _refresh_policy(config: TrainConfig, vp2o: VP2OConfig | None) -> RefreshPolicy:
    if vp2o is not None and vp2o.budget.mode is ControlMode.enforce:
        return WhenSpent(vp2o.budget.max_drift, vp2o.budget.min_ess, vp2o.budget.max_age)
    return EveryBatches(config.rollout.refresh_interval)


def _resume(run: Run, trainer: TrainingLoop) -> None:
    """Start, or take up the newest checkpoint. Nothing that an earlier run has written is touched before all fits."""
    found = None if run.config.resume is Resume.never else checkpoint.latest(Path(run.config.run_dir) / CHECKPOINTS)
    found = first_rank_says(found, run.groups.world)  # another machine's file system may not show it yet
    if found is None:
        run.sink.start()
        run.samples.start(0)
        return
    trainer.restore(run.checkpointer.load(found))
    run.sink.start(trainer.progress.step)
    run.samples.start(trainer.progress.step)
    logger.info("resumed from %s at step %d", found, trainer.progress.step)
    if run.groups.rank == 0 and (chosen := changes(run.config, run.config.run_dir).chosen):
        logger.warning("going on with other settings: %s", "; ".join(chosen))


def _report_rows(config: TrainConfig, task: Task) -> None:
    if isinstance(task, RowsTask):
        text = json.dumps(task.report(), indent=1, ensure_ascii=False)
        (Path(config.run_dir) / ROWS_FILE).write_text(text + "\n", encoding="utf-8")
