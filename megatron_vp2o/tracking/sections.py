"""Every metric that a run may record, in the sections in which they are read. A new metric is one entry here."""

from __future__ import annotations

from megatron_vp2o.tracking.metric import (
    BUDGET,
    COUNT,
    END,
    EVALUATION,
    FRACTION,
    LEARNT,
    LINE,
    MISMATCH,
    NATS,
    NONE,
    OVERLAP,
    PACKING,
    RATE,
    REGION,
    REINFORCEMENT,
    REPLAY,
    SECONDS,
    STEIN,
    STEP,
    SUITES,
    SUPERVISED,
    TOKENS,
    VP2O,
    Aggregate,
    Metric,
    Section,
)


def _evaluation(prefix: str, when: str) -> tuple[Metric, ...]:
    return (
        Metric(f"{prefix}/greedy_accuracy", FRACTION, "problems whose greedy response (temperature 0) is right", when),
        Metric(
            f"{prefix}/pass@{{k}}",
            FRACTION,
            "unbiased estimate of the chance that one of k samples is right, mean over problems",
            when,
        ),
        Metric(f"{prefix}/distinct", COUNT, "distinct right answers among the n samples, mean over problems", when),
        Metric(
            f"{prefix}/coverage",
            FRACTION,
            "distinct right answers found, of all that the problem has; mean over problems",
            when,
        ),
        Metric(
            f"{prefix}/answer_entropy",
            NATS,
            "entropy of the distribution over a problem's distinct right answers, mean over problems that were solved",
            f"{when} with a right sample",
        ),
        Metric(f"{prefix}/response_length", TOKENS, "mean length of all samples, end-of-sequence included", when),
        Metric(f"{prefix}/solution_length", TOKENS, "mean length of the right samples", f"{when} with a right sample"),
    )


SECTIONS: tuple[Section, ...] = (
    Section(
        "Position",
        (
            Metric("step", "steps", "training steps done; 0 is the evaluation before the first", LINE),
            Metric("samples", "sequences", "rollouts (supervised: rows) consumed so far", LINE),
            Metric("tokens", TOKENS, "tokens that counted in the loss so far", LINE),
        ),
    ),
    Section(
        "Reward and rollouts",
        (
            Metric("reward/mean", NONE, "mean reward that the task gives the rollouts", STEP, REINFORCEMENT),
            Metric("reward/std", NONE, "standard deviation of the task's rewards over the batch", STEP, REINFORCEMENT),
            Metric(
                "reward/shaped_mean",
                NONE,
                "mean reward that advantages follow from: the task's, less repulsion between answers and the prior",
                STEP,
                REINFORCEMENT,
            ),
            Metric("reward/shaped_std", NONE, "standard deviation of these over the batch", STEP, REINFORCEMENT),
            Metric(
                "reward/log_ratio",
                NATS,
                "log-ratio of a response to the reference, mean: KL(actor ‖ reference) of whole responses",
                "training steps of runs with the KL in the reward",
                REINFORCEMENT,
            ),
            Metric(
                "reward/part/{part}",
                NONE,
                "weighted summand of a composed reward, mean; overlong: the punishment of responses near the length limit",
                "training steps of runs with `reward`; one key for each that counts",
                REINFORCEMENT,
            ),
            Metric("rollout/pass_rate", FRACTION, "rollouts that are right", STEP, REINFORCEMENT),
            Metric("rollout/pass_any", FRACTION, "groups with at least one right rollout", STEP, REINFORCEMENT),
            Metric("rollout/distinct", COUNT, "distinct right answers in a group, mean", STEP, REINFORCEMENT),
            Metric(
                "rollout/groups_kept",
                COUNT,
                "groups that carry a gradient: whose shaped rewards differ",
                STEP,
                REINFORCEMENT,
            ),
            Metric("rollout/groups_silent", COUNT, "groups that carry no gradient", STEP, REINFORCEMENT),
            Metric(
                "rollout/groups_filtered",
                COUNT,
                "groups left out because they carry no gradient (0 when filtering is off)",
                STEP,
                REINFORCEMENT,
            ),
            Metric(
                "rollout/response_length",
                TOKENS,
                "mean length of a response, end-of-sequence included",
                STEP,
                REINFORCEMENT,
            ),
            Metric("rollout/truncated", FRACTION, "responses cut at the length limit", STEP, REINFORCEMENT),
        ),
    ),
    Section(
        "Policy",
        (
            Metric(
                "policy/loss",
                NONE,
                "objective that was minimised, mean over loss tokens",
                LEARNT,
                REINFORCEMENT,
                aggregate=Aggregate.token_mean,
            ),
            Metric(
                "policy/clip_fraction",
                FRACTION,
                "loss tokens whose gradient the clip stops",
                LEARNT,
                REINFORCEMENT,
                aggregate=Aggregate.token_mean,
            ),
            Metric(
                "policy/approx_kl",
                NATS,
                "KL(behaviour ‖ learner), k3 estimate, mean over loss tokens",
                LEARNT,
                REINFORCEMENT,
                aggregate=Aggregate.token_mean,
            ),
            Metric(
                "policy/kl_reference",
                NATS,
                "KL(learner ‖ reference), k3 estimate, mean over loss tokens",
                "training steps of runs with a reference",
                REINFORCEMENT,
                aggregate=Aggregate.token_mean,
            ),
            Metric(
                "policy/entropy",
                NATS,
                "entropy of the next-token distribution at the rollout temperature, mean over loss tokens",
                LEARNT,
                REINFORCEMENT,
                aggregate=Aggregate.token_mean,
            ),
            Metric(
                "policy/ratio_max",
                NONE,
                "largest importance ratio of a loss token",
                LEARNT,
                REINFORCEMENT,
                Aggregate.maximum,
            ),
            Metric(
                "policy/logprob_mismatch",
                NATS,
                "largest |recomputed - rollout| log-probability under the same weights",
                "training steps with a response",
                REINFORCEMENT,
                Aggregate.maximum,
            ),
        ),
    ),
    Section(
        "Mismatch of engine and trainer",
        (
            Metric(
                "mismatch/logprob_mean",
                NATS,
                "|recomputed - rollout| log-probability under the same weights, mean over tokens",
                MISMATCH,
                REINFORCEMENT,
            ),
            Metric("mismatch/logprob_p99", NATS, "its 99 % quantile (at most 6 % too large)", MISMATCH, REINFORCEMENT),
            Metric("mismatch/logprob_p999", NATS, "its 99.9 % quantile", MISMATCH, REINFORCEMENT),
            Metric(
                "mismatch/kl", NATS, "KL(engine || trainer), k3 estimate, mean over tokens", MISMATCH, REINFORCEMENT
            ),
            Metric(
                "mismatch/weight",
                NONE,
                "weight of a token's surrogate for the mismatch, mean over tokens",
                "training steps of runs with algorithm.mismatch.correction",
                REINFORCEMENT,
            ),
            Metric(
                "mismatch/cut",
                FRACTION,
                "tokens whose weight a bound truncated or set to 0",
                "training steps of runs with algorithm.mismatch.correction",
                REINFORCEMENT,
            ),
        ),
    ),
    Section(
        "Overlap",
        (
            Metric(
                "overlap/age",
                "steps",
                "optimizer steps from the weights that generated the batch to the beginning of training on it",
                OVERLAP,
                REINFORCEMENT,
            ),
            Metric(
                "overlap/token_age",
                "steps",
                "optimizer steps from the weights that made a token to the beginning of training on it, mean over tokens",
                "training steps of runs with rollout.in_flight_updates",
                REINFORCEMENT,
            ),
            Metric(
                "overlap/mixed",
                FRACTION,
                "responses with tokens of several versions of the weights",
                "training steps of runs with rollout.in_flight_updates",
                REINFORCEMENT,
            ),
            Metric(
                "overlap/queued",
                COUNT,
                "later batches that servers had been asked for when training on this one began",
                OVERLAP,
                REINFORCEMENT,
            ),
            Metric(
                "overlap/again",
                "sequences",
                "rollouts generated again so far, because they were older than rollout.max_age, or a resumed run did not find them",
                OVERLAP,
                REINFORCEMENT,
            ),
            Metric(
                "overlap/trainer_waited_s",
                SECONDS,
                "the trainer waited for rollouts; of the slowest rank",
                OVERLAP,
                REINFORCEMENT,
            ),
            Metric(
                "overlap/servers_waited_s",
                SECONDS,
                "servers had nothing to do for the rank that waited longest, between the batch before and this one",
                OVERLAP,
                REINFORCEMENT,
            ),
            Metric(
                "overlap/generation_s",
                SECONDS,
                "servers took for the batch; 0 where it was in the store",
                OVERLAP,
                REINFORCEMENT,
            ),
        ),
    ),
    Section(
        "Packing",
        (
            Metric(
                "packing/tokens_shared",
                FRACTION,
                "tokens that need not be computed, of those of all rows, because rows share their prompt; 0: none was shared",
                PACKING,
                REINFORCEMENT,
            ),
        ),
    ),
    Section(
        "Router replay",
        (
            Metric(
                "replay/tokens",
                FRACTION,
                "tokens of the batch, prompts included, whose routes were replayed",
                REPLAY,
                REINFORCEMENT,
                Aggregate.token_mean,
            ),
            Metric(
                "replay/agreement",
                FRACTION,
                "replayed experts that the trainer's router would have chosen itself, mean over tokens and layers",
                REPLAY,
                REINFORCEMENT,
                Aggregate.token_mean,
            ),
            Metric(
                "replay/agreement_layer_min",
                FRACTION,
                "the same in the layer where it is least",
                REPLAY,
                REINFORCEMENT,
                Aggregate.token_mean,
            ),
        ),
    ),
    Section(
        "Supervised",
        (
            Metric(
                "supervised/loss", NATS, "negative log-likelihood of a token, mean over loss tokens", STEP, SUPERVISED
            ),
            Metric(
                "supervised/validation_loss",
                NATS,
                "the same on held-out data",
                "evaluations of runs with held-out tokens",
                SUPERVISED,
            ),
        ),
    ),
    Section(
        "Optimizer",
        (
            Metric(
                "optimizer/grad_norm",
                NONE,
                "global gradient norm before clipping, mean over updates that have a loss token",
                LEARNT,
            ),
            Metric("optimizer/lr", NONE, "learning rate, mean over the step's updates", STEP),
            Metric("optimizer/steps", COUNT, "optimizer steps taken so far", STEP),
            Metric(
                "optimizer/skipped",
                COUNT,
                "optimizer steps refused so far (a gradient that is not finite, or no loss token)",
                STEP,
            ),
        ),
    ),
    Section(
        "Mixture of experts",
        (
            Metric(
                "moe/load_balancing_loss",
                NONE,
                "load-balancing loss before its coefficient, mean over layers",
                "training steps of runs with a load-balancing loss",
            ),
            Metric(
                "moe/z_loss",
                NONE,
                "router z-loss before its coefficient, mean over layers",
                "training steps of runs with a z-loss",
            ),
            Metric("moe/router_entropy", NATS, "entropy of the router's distribution, mean over tokens", STEIN),
            Metric("moe/expert_utilisation", FRACTION, "experts with at least one token in the step", STEIN),
            Metric("moe/effective_experts", FRACTION, "exp(entropy of the load distribution) / E", STEIN),
            Metric("moe/load_violation", NONE, "largest load / mean load - 1 (MaxVio)", STEIN),
            Metric(
                "moe/output_overlap", NONE, "squared cosine of the outputs of a token's experts, mean over pairs", STEIN
            ),
            Metric(
                "moe/orthogonality_loss",
                NONE,
                "orthogonality loss before its coefficient, mean over tokens (0 when off)",
                STEIN,
            ),
            Metric(
                "moe/variance_loss", NONE, "variance loss before its coefficient, mean over tokens (0 when off)", STEIN
            ),
        ),
    ),
    Section(
        "Stein field",
        (
            Metric("stein/prototype_overlap", NONE, "squared cosine of two prototypes, mean over pairs", STEIN),
            Metric("stein/prototype_overlap_max", NONE, "the largest one", STEIN, aggregate=Aggregate.maximum),
            Metric("stein/prototype_rank", NONE, "effective rank of the prototypes' Gram matrix", STEIN),
            Metric(
                "stein/prototype_residual",
                NONE,
                "|Mv - (v.Mv)v| / (v.Mv): how far prototypes are from converged",
                STEIN,
            ),
            Metric("stein/coactivation_sparsity", FRACTION, "pairs of experts that share no token in the step", STEIN),
            Metric("stein/self_weight", NONE, "weight of an expert's own gradient in the mixture, mean", STEIN),
            Metric("stein/repulsion_ratio", NONE, "norm of the repulsion over that of the attraction", STEIN),
        ),
    ),
    Section(
        "Rollout actors",
        (
            Metric(
                "actor/version",
                "steps",
                "number of the optimizer step whose weights the actors hold (not a lag)",
                STEP,
                REINFORCEMENT,
            ),
            Metric("actor/age", COUNT, "rollout batches generated with these weights", STEP, REINFORCEMENT),
            Metric("actor/refreshes", COUNT, "times the actors got the learner's weights so far", STEP, REINFORCEMENT),
            *(
                Metric(f"actor/refreshes_{reason}", COUNT, f"of these, {meaning}", STEP, REINFORCEMENT)
                for reason, meaning in (
                    ("start", "at the start of a run"),
                    ("interval", "after rollout.refresh_interval batches"),
                    ("drift", "because the drift exceeded its bound"),
                    ("ess", "because the effective sample size fell below its bound"),
                    ("rejected", "because a step was rejected"),
                    ("max_age", "because the actors reached their largest age"),
                )
            ),
        ),
    ),
    Section(
        "Proximal control",
        (
            Metric(
                "trust_region/distance",
                NONE,
                "D: mean distance of the learner's barycenters from the anchor's after the step, mean over updates",
                REGION,
                VP2O,
            ),
            Metric("trust_region/distance_gates", NONE, "its part from the routers", REGION, VP2O),
            Metric("trust_region/distance_prototypes", NONE, "its part from the prototypes", REGION, VP2O),
            Metric(
                "trust_region/distance_layer_max",
                NONE,
                "D of the layer with the largest",
                REGION,
                VP2O,
                Aggregate.maximum,
            ),
            Metric("trust_region/proposed", NONE, "D of the step as the optimizer proposed it", REGION, VP2O),
            Metric(
                "trust_region/delta", NONE, "bound of D in force: the setting, or learnt from the run", REGION, VP2O
            ),
            Metric(
                "trust_region/policy_drift",
                NATS,
                "mean |log pi - log pi_actor| of a response token after the step, on a share of its rows",
                REGION,
                VP2O,
            ),
            Metric(
                "trust_region/policy_drift_proposed",
                NATS,
                "the same of the step as the optimizer proposed it",
                REGION,
                VP2O,
            ),
            Metric("trust_region/halvings", COUNT, "how often an update was halved, mean", REGION, VP2O),
            Metric("trust_region/halved", COUNT, "updates taken after halving so far", REGION, VP2O, Aggregate.maximum),
            Metric("trust_region/rejected", COUNT, "updates taken back so far", REGION, VP2O, Aggregate.maximum),
            Metric("budget/drift", NATS, "mean |log-ratio| of a response", BUDGET, VP2O),
            Metric("budget/ess", FRACTION, "tempered effective sample size over the number of responses", BUDGET, VP2O),
        ),
    ),
    Section("Evaluation on validation problems", _evaluation("eval", EVALUATION)),
    Section("Evaluation on test problems", _evaluation("test", END)),
    Section(
        "Benchmarks during training",
        (
            Metric(
                "suite/{suite}/correct",
                FRACTION,
                "samples of this benchmark that are right, mean over problems",
                SUITES,
            ),
            Metric("suite/{suite}/solution_tokens", TOKENS, "tokens of an answer after its thinking, mean", SUITES),
            Metric("suite/{suite}/truncated", FRACTION, "answers that the length limit cut off", SUITES),
        ),
    ),
    Section(
        "Time",
        (
            Metric("time/step_s", SECONDS, "the training step, without evaluation and checkpoint", STEP),
            Metric("time/rollout_s", SECONDS, "generating the rollouts, or waiting for them", STEP, REINFORCEMENT),
            Metric(
                "time/reference_s", SECONDS, "scoring the rollouts under the reference (0 without)", STEP, REINFORCEMENT
            ),
            Metric("time/reward_s", SECONDS, "verifying the responses", STEP, REINFORCEMENT),
            Metric("time/train_s", SECONDS, "forward, backward and optimizer", STEP),
            Metric("time/sync_s", SECONDS, "handing weights to the actors", STEP, REINFORCEMENT),
            Metric("time/eval_s", SECONDS, "evaluation", EVALUATION),
            Metric("time/checkpoint_s", SECONDS, "saving the last checkpoint", "the step after a checkpoint"),
            Metric("time/elapsed_s", SECONDS, "steps and evaluations so far, over all restarts", LINE),
            Metric("time/tokens_per_s", RATE, "loss tokens trained on in a second of `time/train_s`", STEP),
            Metric(
                "time/rollout_tokens_per_s",
                RATE,
                "tokens generated in a second of `time/rollout_s`, with rollout.ahead of `overlap/generation_s`",
                STEP,
                REINFORCEMENT,
            ),
        ),
    ),
)
