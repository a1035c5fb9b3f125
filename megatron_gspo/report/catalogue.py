"""The figures over steps, as data: which metrics, what they are, how to read them. `report` and `compare` draw the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gspo.report.figure import Axis


@dataclass(frozen=True)
class Panel:
    """One question, and the metrics that answer it; a name may hold `*`, which the legend then shows."""

    id: str
    title: str
    metrics: Mapping[str, str]  # metric name -> legend
    axis: Axis
    how_to_read: str
    definition: str


TRAINING = (
    Panel(
        "reward",
        "Reward and evaluation",
        {"reward/mean": "rollouts", "eval/*/pass_at_1": "held-out * pass@1"},
        Axis("reward, pass@1"),
        "Up is better; where rollouts rise and held-out problems do not, the policy learns the training problems alone.",
        "Mean reward r(x, y) of the step's responses (§2), and the share of samples that solve a held-out problem.",
    ),
    Panel(
        "clip_fraction",
        "Clip fraction",
        {"clip/token_fraction": "tokens", "clip/sequence_fraction": "responses with a clipped token"},
        Axis("share", logarithmic=True),
        "GSPO clips about a hundred times more tokens than GRPO and still learns; 0 throughout means no trust region at all.",
        "Share of response tokens whose gradient the clip removed, in GSPO all tokens of a clipped response (Figure 2, §5.2).",
    ),
    Panel(
        "clip_sides",
        "Which bound clips",
        {"clip/low_fraction": "below 1 - ε low", "clip/high_fraction": "above 1 + ε high"},
        Axis("share of tokens", logarithmic=True),
        "One side far above the other says that the range is lopsided for this objective.",
        "Clipped tokens by the bound that their ratio crossed, by the sign of the advantage (eqs. 2, 6).",
    ),
    Panel(
        "ratio_spread",
        "Spread of the importance ratio",
        {"ratio/token_log_std": "token, log w", "ratio/sequence_log_std": "sequence, log s"},
        Axis("standard deviation", logarithmic=True),
        "Averaging alone makes the sequence's spread √(response length) times smaller; more than that is what GSPO gains.",
        "Standard deviation of log w (eq. 3) over tokens and of the length-normalised log s (eq. 8) over responses.",
    ),
    Panel(
        "ratio_largest",
        "Largest importance ratio",
        {"ratio/token_abs_log_max": "token, |log w|", "ratio/sequence_abs_log_max": "sequence, |log s|"},
        Axis("largest |log ratio|", logarithmic=True),
        "Values above 1 mean that a likelihood changed by more than e-fold within one step.",
        "Largest |log w| (eq. 3) and |log s| (eq. 8) of the step's updates.",
    ),
    Panel(
        "effective_samples",
        "Effective sample fraction",
        {"ratio/effective_sample_fraction": "tokens"},
        Axis("share"),
        "1 where all tokens weigh the same; what it loses is what unequal importance weights waste (§4.2).",
        "(Σw)² / (T Σw²) over tokens, w the ratio that the objective weights the token by.",
    ),
    Panel(
        "entropy",
        "Entropy",
        {"entropy/mean": "policy"},
        Axis("nats a token"),
        "Falls as the policy grows sure; near 0 it no longer explores, and a rise often announces a collapse.",
        "Mean entropy of the policy's next-token distribution at response tokens.",
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        {"grad_norm": "before clipping"},
        Axis("norm", logarithmic=True),
        "Spikes announce trouble.",
        "Mean norm of the gradient over the step's updates, before training.gradient_clip.",
    ),
    Panel(
        "response_length",
        "Response length",
        {"response/length_mean": "rollouts", "eval/*/length_mean": "held-out *"},
        Axis("tokens"),
        "Sudden growth or shrinkage means that the policy found another way to be rewarded.",
        "Mean tokens |y| of a response, the stop token included; of several turns those that the policy sampled.",
    ),
    Panel(
        "turns",
        "Turns of a response",
        {"response/turns_mean": "turns", "response/observation_tokens_mean": "tokens of the environment"},
        Axis("mean of a response"),
        "One turn throughout means that the policy has stopped asking its environment, or never began.",
        "Stretches of tokens that the policy sampled, and what an environment wrote between them (environment.name).",
    ),
    Panel(
        "groups",
        "Groups and responses",
        {
            "reward/solved_fraction": "responses solved",
            "response/truncated_fraction": "responses truncated",
            "groups/zero_variance_fraction": "groups of one reward",
        },
        Axis("share", share=True),
        "Groups of one reward have advantage 0 and teach nothing; truncated responses were never finished.",
        "Shares of the step's responses, and of its groups whose rewards are all equal (eq. 7).",
    ),
    Panel(
        "staleness",
        "Staleness",
        {"rollout/staleness_mean": "mean", "rollout/staleness_max": "largest"},
        Axis("policy versions"),
        "How many steps behind the trained policy the responses were sampled; 0 is on-policy.",
        "Version of the policy at the step's start minus the version that sampled the token, over response tokens.",
    ),
    Panel(
        "loss",
        "Loss and KL",
        {"loss/policy": "policy loss", "loss/kl": "KL to the reference"},
        Axis("loss"),
        "The policy loss says little by itself; a growing KL says how far the policy has left its start.",
        "The objective with its sign turned (eqs. 2, 6, 14), and the KL penalty's estimate before its coefficient.",
    ),
    Panel(
        "learning_rate",
        "Learning rate",
        {"lr": "learning rate"},
        Axis("learning rate"),
        "What each update was made with, averaged over the step.",
        "Adam's step size, with warm-up and schedule.",
    ),
)

VOLATILITY = (
    Panel(
        "change_rate",
        "Expert change rate",
        {
            "routing/change_rate": "after all of the step's updates",
            "routing/change_rate_after_update_1": "after one update",
            "routing/noise_floor": "noise floor",
            "routing/noise_floor_repacked": "noise floor, repacked",
        },
        Axis("share of activated experts", share=True),
        "The paper saw about 10% after an update of a 48-layer model; only what rises above the noise floor is a change.",
        "c = 1 - |E_old ∩ E_new| / K, mean over response tokens and MoE layers, natural routing, on the probe (§5.3).",
    ),
    Panel(
        "tokens_any_change",
        "Tokens with any change",
        {
            "routing/tokens_any_change": "after all of the step's updates",
            "routing/tokens_any_change_after_update_1": "after one update",
            "routing/noise_floor_tokens_any_change": "noise floor",
        },
        Axis("share of tokens", share=True),
        "With many layers this nears 100% long before the change rate is large.",
        "Share of response tokens whose set of experts changed in at least one MoE layer (§5.3).",
    ),
    Panel(
        "update_change",
        "Change seen by the updates themselves",
        {
            "routing/update_change_rate": "natural routing",
            "routing/replayed_path_change_rate": "along the replayed path",
        },
        Axis("share of activated experts", share=True),
        "Costs no extra pass; under replay it is drift along the replayed path and not comparable with natural routing.",
        "c between the old-policy pass and each update's own forward pass, mini-batches 2 to m (§5.3).",
    ),
    Panel(
        "replay",
        "Is Routing Replay in force?",
        {
            "routing/replayed_token_fraction": "tokens replayed",
            "routing/live_token_fraction": "tokens routed live",
        },
        Axis("share of tokens", share=True),
        "100% replayed where routing.replay asks for it, else 0%; never anything between.",
        "Tokens × routers given a recorded route, over those that should have been (Routing Replay, §5.3).",
    ),
    Panel(
        "ratio_by_change",
        "Log-ratios of rerouted and other tokens",
        {
            "ratio/token_log_std_changed": "tokens with a changed route",
            "ratio/token_log_std_unchanged": "tokens without",
        },
        Axis("spread of log w", logarithmic=True),
        "Where changed routes make ratios fluctuate, as the paper argues, the first line lies above the second.",
        "Standard deviation of log w (eq. 3) on the probe, over tokens with c > 0 in any layer and with c = 0 (§5.3).",
    ),
    Panel(
        "ratio_size_by_change",
        "Size of log-ratios of rerouted and other tokens",
        {
            "ratio/token_abs_log_mean_changed": "tokens with a changed route",
            "ratio/token_abs_log_mean_unchanged": "tokens without",
        },
        Axis("mean |log w|", logarithmic=True),
        "The gap is what goes along with rerouting; it need not be caused by it.",
        "Mean of |log w| (eq. 3) on the probe, by whether any of the token's routes changed (§5.3).",
    ),
    Panel(
        "change_correlation",
        "Does the ratio follow the routes?",
        {
            "ratio/token_change_correlation": "token: c with |log w|",
            "ratio/sequence_change_correlation": "sequence: c with |log s|",
        },
        Axis("correlation"),
        "1: the more experts change the larger the ratio; 0: no linear relation.",
        "Pearson correlation of the change rate with |log w| over tokens, and with |log s| over responses (eqs. 3, 8; §5.3).",
    ),
    Panel(
        "token_decomposition",
        "What moves the token ratio",
        {
            "ratio/token_routing_variance_share": "routing",
            "ratio/token_replayed_variance_share": "weights, routes replayed",
            "ratio/token_routing_covariance_share": "both together",
        },
        Axis("share of the variance of log w", share=True),
        "The three sum to 100%; with little of both together, the first is the noise that Routing Replay removes.",
        "log w = b + r, b with the old routes replayed: var r, var b and 2 cov(b, r) over var log w (eq. 3; §5.3).",
    ),
    Panel(
        "sequence_decomposition",
        "What moves the sequence ratio",
        {
            "ratio/sequence_routing_variance_share": "routing",
            "ratio/sequence_replayed_variance_share": "weights, routes replayed",
            "ratio/sequence_routing_covariance_share": "both together",
        },
        Axis("share of the variance of log s", share=True),
        "A smaller routing share than the token's is the paper's case for sequence likelihoods.",
        "The same for the length-normalised log s (eq. 8; §5.3).",
    ),
    Panel(
        "engine_routes",
        "Engine against trainer: routes",
        {
            "routing/engine_disagreement": "experts",
            "routing/engine_disagreement_tokens_any_layer": "tokens, in any layer",
        },
        Axis("share", share=True),
        "At equal weights two engines should agree; what they differ by is numerics, or a bug.",
        "c between the rollout engine's routes and the trainer's, at equal weights (R3, §5.4).",
    ),
    Panel(
        "engine_log_probs",
        "Engine against trainer: likelihoods",
        {
            "mismatch/log_prob_abs_mean": "mean |difference| of a token",
            "mismatch/token_log_std": "spread over tokens",
            "mismatch/sequence_log_std": "spread over sequences",
            "mismatch/stale_log_prob_abs_mean": "mean |difference| of a token in a stale response",
            "mismatch/kl": "KL estimate",
        },
        Axis("nats", logarithmic=True),
        "With rollout.old_log_probs=engine the spread must lie below the clip range, or the loss clips on noise.",
        "log π_trainer - log π_engine at equal weights; the sequence's is its mean over tokens (eq. 8, §5.4).",
    ),
    Panel(
        "importance_weights",
        "Truncated importance weights",
        {
            "mismatch/importance_weight_mean": "mean weight of a token",
            "mismatch/importance_truncated_fraction": "share of tokens at the cap",
        },
        Axis("weight, share"),
        "Near 1 and near 0 the engines agree; a falling mean or a rising share is a mismatch that the cap hides.",
        "min(π_trainer / π_engine, objective.truncated_importance_cap) at the weights that sampled the token (§5.4).",
    ),
    Panel(
        "load",
        "Expert load",
        {"routing/load_cv": "spread of the load", "routing/dead_experts": "experts without a token"},
        Axis("coefficient of variation, share"),
        "Rising lines mean that fewer experts do the work.",
        "Standard deviation over mean of the tokens an expert gets, and the share of experts with none; mean over layers.",
    ),
    Panel(
        "margin_auc",
        "Do close decisions flip?",
        {"routing/margin_auc": "AUC"},
        Axis("AUC"),
        "1: small margins foretell every change; 0.5: they say nothing.",
        "Chance that a changed token's old margin (K-th minus K+1-th router score) is smaller than an unchanged one's.",
    ),
)

COST = (
    Panel(
        "throughput",
        "Throughput",
        {"throughput/tokens_per_s": "prompt and response tokens"},
        Axis("tokens a second"),
        "A slow fall is usually responses growing longer.",
        "Tokens of all ranks over the wall-clock time of the whole step.",
    ),
    Panel(
        "memory",
        "Memory",
        {"memory/peak_gib": "peak of the first rank"},
        Axis("GiB"),
        "A peak can only rise; steady growth to the end of the run is a leak.",
        "Most memory the process has held: on the GPU where there is one, else in RAM.",
    ),
    Panel(
        "packing",
        "Packing and balance",
        {
            "packing/fill_fraction": "fill of micro-batches",
            "packing/rank_token_imbalance": "most loaded rank over mean",
            "packing/skipped_fraction": "responses with nothing to learn from",
        },
        Axis("ratio"),
        "Fill below half wastes passes; imbalance above 1 makes ranks wait.",
        "Tokens over the budget tokens_per_micro_batch, and tokens of the most loaded data-parallel rank over the mean.",
    ),
)
