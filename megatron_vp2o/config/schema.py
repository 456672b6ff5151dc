"""Every setting of a run, as dataclasses: the one place where a default is written.

Hydra composes these (see `register.py`), YAML files hold only differences from them, and `train.py` turns the composed
config into plain objects once.  Names follow Megatron where Megatron has one.  No torch here: importing this must stay
instant, because `--help` and every config error go through it.

A docstring under a field is its documentation; `docs/configuration.md` is generated from them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

from megatron_vp2o.config.algorithm import Algorithm as Algorithm
from megatron_vp2o.config.algorithm import AlgorithmConfig as AlgorithmConfig
from megatron_vp2o.config.algorithm import AnswerRepulsionConfig as AnswerRepulsionConfig
from megatron_vp2o.config.algorithm import BudgetConfig as BudgetConfig
from megatron_vp2o.config.algorithm import ControlMode as ControlMode
from megatron_vp2o.config.algorithm import DataConfig as DataConfig
from megatron_vp2o.config.algorithm import DataSource as DataSource
from megatron_vp2o.config.algorithm import GRPOConfig as GRPOConfig
from megatron_vp2o.config.algorithm import KLReference as KLReference
from megatron_vp2o.config.algorithm import MismatchConfig as MismatchConfig
from megatron_vp2o.config.algorithm import PrefixSharing as PrefixSharing
from megatron_vp2o.config.algorithm import SpecializationConfig as SpecializationConfig
from megatron_vp2o.config.algorithm import SteinConfig as SteinConfig
from megatron_vp2o.config.algorithm import SupervisedConfig as SupervisedConfig
from megatron_vp2o.config.algorithm import TrustRegionConfig as TrustRegionConfig
from megatron_vp2o.config.algorithm import VP2OConfig as VP2OConfig
from megatron_vp2o.config.model import Activation as Activation
from megatron_vp2o.config.model import Dispatcher as Dispatcher
from megatron_vp2o.config.model import Implementation as Implementation
from megatron_vp2o.config.model import LoadBalancing as LoadBalancing
from megatron_vp2o.config.model import ModelConfig as ModelConfig
from megatron_vp2o.config.model import PositionEmbedding as PositionEmbedding
from megatron_vp2o.config.model import Precision as Precision
from megatron_vp2o.config.model import RouterScore as RouterScore
from megatron_vp2o.config.model import SoftmaxType as SoftmaxType
from megatron_vp2o.config.ranges import COUNT, DECAY, INDEX, SEED, SHARE, Range
from megatron_vp2o.config.reward import Checker as Checker
from megatron_vp2o.config.reward import RewardConfig as RewardConfig
from megatron_vp2o.config.reward import SandboxKind as SandboxKind
from megatron_vp2o.config.rollout import EngineKind as EngineKind
from megatron_vp2o.config.rollout import RolloutConfig as RolloutConfig
from megatron_vp2o.config.rollout import RouterReplay as RouterReplay
from megatron_vp2o.config.rollout import SamplingConfig as SamplingConfig
from megatron_vp2o.config.rollout import ServerConfig as ServerConfig
from megatron_vp2o.config.rollout import WeightTransfer as WeightTransfer
from megatron_vp2o.config.task import AddendsTaskConfig as AddendsTaskConfig
from megatron_vp2o.config.task import AnswerFormat as AnswerFormat
from megatron_vp2o.config.task import BracketsTaskConfig as BracketsTaskConfig
from megatron_vp2o.config.task import ChangeTaskConfig as ChangeTaskConfig
from megatron_vp2o.config.task import ColoringTaskConfig as ColoringTaskConfig
from megatron_vp2o.config.task import CountdownTaskConfig as CountdownTaskConfig
from megatron_vp2o.config.task import LinearOrderTaskConfig as LinearOrderTaskConfig
from megatron_vp2o.config.task import OpenPathTaskConfig as OpenPathTaskConfig
from megatron_vp2o.config.task import OwnTaskConfig as OwnTaskConfig
from megatron_vp2o.config.task import ShortestPathTaskConfig as ShortestPathTaskConfig
from megatron_vp2o.config.task import TaskConfig as TaskConfig
from megatron_vp2o.core.choices import AdvantageEstimator as AdvantageEstimator
from megatron_vp2o.core.choices import AnswerKernel as AnswerKernel
from megatron_vp2o.core.choices import AnswerRepulsion as AnswerRepulsion
from megatron_vp2o.core.choices import Kernel as Kernel
from megatron_vp2o.core.choices import KLEstimator as KLEstimator
from megatron_vp2o.core.choices import MismatchCorrection as MismatchCorrection
from megatron_vp2o.core.choices import MismatchLevel as MismatchLevel
from megatron_vp2o.core.choices import Normalisation as Normalisation
from megatron_vp2o.core.choices import Orthogonality as Orthogonality
from megatron_vp2o.core.choices import OrthogonalityScale as OrthogonalityScale
from megatron_vp2o.core.choices import PolicyLoss as PolicyLoss
from megatron_vp2o.core.choices import RatioLength as RatioLength
from megatron_vp2o.core.choices import RepulsionScale as RepulsionScale
from megatron_vp2o.core.choices import TemperatureScaling as TemperatureScaling


class LRDecay(enum.Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Resume(enum.Enum):
    auto = "auto"  # from the newest whole checkpoint of run_dir if there is one, else start
    never = "never"  # start; refuse a run_dir that already holds a run
    must = "must"  # refuse to start without a checkpoint


class WandbMode(enum.Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class ParallelConfig:
    """How the model is split. Data parallelism is what is left: world / (tensor * pipeline * context)."""

    tensor_parallel: Annotated[int, Range(1, 2**16)] = 1
    """TP: attention and embeddings split over heads and vocabulary."""
    pipeline_parallel: Annotated[int, Range(1, 2**16)] = 1
    """PP: consecutive layers on different ranks."""
    context_parallel: Annotated[int, Range(1, 2**16)] = 1
    """CP: the positions of each sequence split over ranks, in training and scoring."""
    expert_parallel: Annotated[int, Range(1, 2**16)] = 1
    """EP: experts split over ranks; takes its ranks from the data- and tensor-parallel ones."""
    expert_tensor_parallel: Annotated[int, Range(1, 2**16)] = 1
    """ETP: each expert's intermediate width split over ranks."""
    sequence_parallel: Optional[bool] = None
    """Sequence parallelism; null means whenever tensor_parallel > 1 (Megatron needs it there with MoE)."""
    distributed_optimizer: bool = False
    """Shard optimizer state and fp32 masters over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while back-propagation runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward runs (distributed optimizer only)."""
    timeout_minutes: Annotated[float, Range(0.01, 10080)] = 30.0
    """How long a collective may wait before the process group is declared dead."""
    startup_minutes: Annotated[float, Range(0.01, 10080)] = 10.0
    """How long ranks wait for each other at the start, from the first one's until the last one's Python runs."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Steps are optimizer steps."""

    lr: Annotated[float, Range(1e-12, 10)] = 1e-3
    """Peak learning rate."""
    min_lr: Annotated[float, Range(1e-12, 10, also=(0,))] = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: Annotated[int, INDEX] = 0
    """Linear warm-up, in optimizer steps."""
    lr_decay_style: LRDecay = LRDecay.cosine
    """Shape of the decay, over all optimizer steps of the run."""
    weight_decay: Annotated[float, Range(1e-12, 100, also=(0,))] = 0.01
    """Decoupled weight decay; norms are not decayed."""
    adam_beta1: Annotated[float, DECAY] = 0.9
    """First-moment decay."""
    adam_beta2: Annotated[float, DECAY] = 0.95
    """Second-moment decay."""
    adam_eps: Annotated[float, Range(1e-20, 1)] = 1e-8
    """Denominator epsilon."""
    clip_grad: Annotated[float, Range(1e-9, 10**9, also=(0,))] = 1.0
    """Global gradient-norm clip; 0 turns it off."""


@dataclass
class SuiteConfig:
    """How the benchmarks of evaluation.suites are asked during training."""

    interval: Annotated[Optional[int], INDEX] = None
    """Training steps between evaluations of the suites; 0: only at start and end; null: evaluation.interval."""
    data: str = "data/eval"
    """Folder with the benchmarks' rows (`make eval-data`); `own`: the few problems of our own, which only show that all works."""
    samples: Annotated[Optional[int], Range(1, 2**20 - 1)] = None
    """Samples of each problem; null: the benchmark's own number."""
    limit: Annotated[Optional[int], COUNT] = None
    """Only so many problems of each benchmark, the first; null: all."""
    max_new_tokens: Annotated[Optional[int], Range(1, 2**20)] = None
    """Longest answer; null: rollout.sampling.max_new_tokens."""
    temperature: Annotated[float, Range(1e-3, 1000, also=(0,))] = 0.6
    """Temperature; 0 takes one greedy answer."""
    top_p: Annotated[float, SHARE] = 0.95
    """Nucleus."""
    batch: Annotated[int, Range(1, 10**6)] = 64
    """Answers that are generated together, over all ranks."""
    workers: Annotated[Optional[int], Range(1, 1024)] = None
    """Grading processes of each kind, on the first rank; null: the node's cores, at most 8."""
    thinking: Optional[bool] = None
    """Handed to chat templates that know enable_thinking."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation."""

    interval: Annotated[int, INDEX] = 20
    """Training steps between evaluations; 0 evaluates only at start and end."""
    problems: Annotated[int, Range(1, 10**6)] = 100
    """Problems of the validation split per evaluation."""
    samples: Annotated[int, Range(1, 10**6)] = 16
    """n, samples per problem for pass@k, coverage and entropy."""
    temperature: Annotated[float, Range(1e-3, 1000)] = 1.0
    """Temperature of those samples."""
    top_p: Annotated[float, SHARE] = 1.0
    """Nucleus of those samples."""
    pass_at: Annotated[list[int], Range(1, 10**6)] = field(default_factory=lambda: [1, 4, 16])
    """The k of pass@k; each at most `samples`."""
    final_split: bool = True
    """Evaluate the test split once at the end."""
    suites: list[str] = field(default_factory=list)
    """Benchmarks that are evaluated during training, too, by name or suite as `make eval` takes them: `[aime24,gpqa]`."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    """How they are asked."""


@dataclass
class CheckpointConfig:
    """What is saved, and when."""

    interval: Annotated[int, INDEX] = 50
    """Training steps between checkpoints; 0 saves only at the end."""
    keep: Annotated[int, COUNT] = 2
    """Newest checkpoints kept."""
    save_at_end: bool = True
    """Save when the run ends."""
    export_hf: bool = False
    """Write the final weights to `hf` in the run folder, too, as a Hugging Face checkpoint."""
    compare_logits: bool = True
    """Compare what a Hugging Face checkpoint computes after loading (`init_from`) with transformers, before the first step."""


@dataclass
class LoggingConfig:
    """Where metrics go. `metrics.jsonl` in the run folder is always written and is the record."""

    wandb: WandbMode = WandbMode.disabled
    """Weights & Biases; offline never touches the network."""
    wandb_project: str = "megatron-vp2o"
    """Project name there."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    console_interval: Annotated[int, COUNT] = 1
    """Steps between console lines when the output is no terminal (a terminal shows a live progress bar)."""
    sample_interval: Annotated[int, INDEX] = 10
    """Steps between samples of rollouts in `samples.jsonl` in the run folder (the first step's are always there); 0: none."""
    sample_prompts: Annotated[int, COUNT] = 2
    """Prompts among them."""
    sample_responses: Annotated[int, COUNT] = 4
    """Responses of each of those prompts: the best, the worst, further ones."""
    sample_table: bool = False
    """Print them as a table, too."""


@dataclass
class TrainConfig:
    """A whole run."""

    algorithm: AlgorithmConfig = field(default_factory=GRPOConfig)
    """supervised | grpo | vp2o."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its layout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and schedule."""
    task: TaskConfig = field(default_factory=CountdownTaskConfig)
    """Problems and verifier."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout engine."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    name: str = "run"
    """Name of the run: of its folder, its plots, its tracker entry."""
    run_dir: str = "runs/${name}"
    """Folder of everything the run writes."""
    seed: Annotated[int, SEED] = 1234
    """Seed of initialisation, data order and sampling."""
    init_from: Optional[str] = None
    """Checkpoint folder, run folder or Hugging Face folder whose weights the run starts from; null starts from random weights."""
    resume: Resume = Resume.auto
    """Continue from the newest whole checkpoint of run_dir if there is one (auto), only so (must), or start in a
    run_dir that holds no run yet (never)."""
    threads: Annotated[Optional[int], Range(1, 1024)] = None
    """CPU threads per process; null divides the cores that the job may use among its processes on this node."""
    exp_manager: Any = None
    """Settings of NeMo's experiment manager (folder, loggers), as in NeMo's recipes; needs nemo-toolkit; null: not used."""
    notes: Any = None
    """Free text kept with the run."""
