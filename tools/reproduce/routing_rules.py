"""Rules about what is measured in every run: clip fractions, changed experts, the parts of a ratio. Claims 2, 4 and 5.

In: results. Out: answers.
"""

from __future__ import annotations

import numpy as np

from tools.reproduce.answers import Answer, Verdict, shown, too_few
from tools.reproduce.intervals import Estimate, mean_of, ratio_of_means, slope
from tools.reproduce.measure import Results, paired
from tools.reproduce.study import MODELS, Replicate

TWO_ORDERS = (30.0, 300.0)
ABOUT_TEN_PERCENT = (0.05, 0.20)
LEAST_ROUTING_SHARE = 0.10
HARDLY = 0.5
MIN_DEPTH_REPLICATES = 4  # of each depth; two of each cold start


def clip_ratio(
    results: Results, arms: tuple[tuple[str, str], tuple[str, str]]
) -> tuple[Estimate | None, int, str | None]:
    """Clip fraction of the first (experiment, arm) over that of the second; pairs; why it cannot be judged."""
    (one, other) = (results.of(*where) for where in arms)
    pairs = paired(one, other, lambda run: run.mean("clip/token_fraction"))
    problem = too_few(list(pairs))
    if not pairs:
        return None, 0, problem
    return ratio_of_means(*zip(*pairs.values(), strict=True)), len(pairs), problem


def clips_more(results: Results) -> Answer:
    """Claim 2, each at its own range."""
    ratio, _, problem = clip_ratio(results, (("common", "gspo"), ("common", "grpo")))
    label = "clip fraction, GSPO over GRPO"
    if ratio is None or problem is not None:
        return Answer(Verdict.OPEN, problem or "GRPO never clipped", {label: ratio} if ratio is not None else {})
    verdict = Verdict.NOT_TESTABLE
    if ratio.surely_within(*TWO_ORDERS):
        verdict = Verdict.REPRODUCED
    elif ratio.surely_below(TWO_ORDERS[0]) or ratio.surely_above(TWO_ORDERS[1]):
        verdict = Verdict.NOT_REPRODUCED
    share = [
        f"{mean_of([run.mean('clip/token_fraction') for run in results.of('common', arm).values()]).value:.2%}"
        for arm in ("gspo", "grpo")
    ]
    return Answer(verdict, f"GSPO {share[0]} of tokens, GRPO {share[1]}: {shown(ratio)} times", {label: ratio})


def clips_more_whatever_the_range(results: Results) -> Answer:
    """Claim 2, with one objective's range brought to the other's scale."""
    cases = {
        "GSPO over tight GRPO": (("common", "gspo"), ("clip", "grpo_tight")),
        "wide GSPO over GRPO": (("clip", "gspo_wide"), ("common", "grpo")),
    }
    found = {label: clip_ratio(results, arms) for label, arms in cases.items()}
    estimates = {label: ratio for label, (ratio, _, _) in found.items() if ratio is not None}
    problem = next((problem for _, _, problem in found.values() if problem is not None), None)
    if problem is not None or len(estimates) < len(cases):
        return Answer(Verdict.OPEN, problem or "an arm never clipped", estimates)
    verdict = Verdict.NOT_TESTABLE
    if all(ratio.surely_within(*TWO_ORDERS) for ratio in estimates.values()):
        verdict = Verdict.REPRODUCED
    elif any(ratio.surely_below(TWO_ORDERS[0]) or ratio.surely_above(TWO_ORDERS[1]) for ratio in estimates.values()):
        verdict = Verdict.NOT_REPRODUCED
    told = "; ".join(f"{label} {shown(ratio)} times" for label, ratio in estimates.items())
    return Answer(verdict, told, estimates)


AFTER_ONE = "routing/change_rate_after_update_1"


def change_by_depth(results: Results, metric: str = AFTER_ONE) -> dict[int, dict[Replicate, float]]:
    """Change rates of GRPO at the common rate by number of MoE layers, of the depths that have runs."""
    names = {
        "common": ("moe_8",),
        "depth": results.experiments["depth"].models if "depth" in results.experiments else (),
    }
    runs = {
        MODELS[model].layers: results.of(experiment, "grpo", model=model)
        for experiment, models in names.items()
        for model in models
    }
    return {
        layers: {key: run.mean(metric) for key, run in sorted(runs[layers].items())}
        for layers in sorted(runs)
        if runs[layers]
    }


def _paired_depths(results: Results) -> dict[int, list[float]]:
    """The same of the replicates that every depth of the study has; empty while there are too few."""
    rates = change_by_depth(results)
    common = set.intersection(*(set(found) for found in rates.values())) if rates else set()
    if len(rates) <= len(results.experiments["depth"].models) or len(common) < MIN_DEPTH_REPLICATES:
        return {}
    return {layers: [found[key] for key in sorted(common)] for layers, found in rates.items()}


TOO_FEW_DEPTHS = f"fewer than {MIN_DEPTH_REPLICATES} replicates have run at every depth"


def ten_percent_change(results: Results) -> Answer:
    """Claim 4's size, in the deepest model."""
    rates = _paired_depths(results)
    if not rates:
        return Answer(Verdict.OPEN, TOO_FEW_DEPTHS)
    deepest = max(rates)
    estimates = {f"{layers} layers": mean_of(found) for layers, found in rates.items()}
    rate = estimates[f"{deepest} layers"]
    verdict = Verdict.NOT_TESTABLE
    if rate.surely_within(*ABOUT_TEN_PERCENT):
        verdict = Verdict.REPRODUCED
    elif rate.surely_below(ABOUT_TEN_PERCENT[0]) or rate.surely_above(ABOUT_TEN_PERCENT[1]):
        verdict = Verdict.NOT_REPRODUCED
    floor = np.mean([run.mean("routing/noise_floor") for run in results.of("common", "grpo").values()])
    told = f"{deepest} layers: {shown(rate, percent=True)} of the activated experts after one update"
    return Answer(verdict, f"{told}; noise floor {floor:.2%}", estimates)


def more_change_in_deeper_models(results: Results) -> Answer:
    """Claim 4's trend."""
    rates = _paired_depths(results)
    if not rates:
        return Answer(Verdict.OPEN, TOO_FEW_DEPTHS)
    trend = slope([(float(np.log2(layers)), np.log2(found).tolist()) for layers, found in rates.items()])
    verdict = Verdict.NOT_TESTABLE
    if trend.surely_above(0.0):
        verdict = Verdict.REPRODUCED
    elif trend.surely_below(0.0):
        verdict = Verdict.NOT_REPRODUCED
    means = ", ".join(f"{layers}: {np.mean(found):.2%}" for layers, found in rates.items())
    factor = Estimate(2**trend.value, 2**trend.low, 2**trend.high, trend.count)
    return Answer(
        verdict, f"times {shown(factor)} for each doubling of depth; by layers {means}", {"a doubling of depth": factor}
    )


def more_change_where_fewer_are_activated(results: Results) -> Answer:
    """Claim 4's trend in sparsity: 2 of 64 experts beside 2 of 16."""
    pairs = paired(results.of("sparse", "grpo"), results.of("common", "grpo"), lambda run: run.mean(AFTER_ONE))
    if len(pairs) < MIN_DEPTH_REPLICATES:
        return Answer(Verdict.OPEN, f"fewer than {MIN_DEPTH_REPLICATES} replicates have run")
    sparse, common = zip(*pairs.values(), strict=True)
    ratio = ratio_of_means(sparse, common)
    if ratio is None:
        return Answer(Verdict.NOT_TESTABLE, "no expert changed")
    verdict = Verdict.NOT_TESTABLE
    if ratio.surely_above(1.0):
        verdict = Verdict.REPRODUCED
    elif ratio.surely_below(1.0):
        verdict = Verdict.NOT_REPRODUCED
    told = f"2 of 64 experts: {np.mean(sparse):.2%}, 2 of 16: {np.mean(common):.2%}; {shown(ratio)} times"
    return Answer(verdict, told, {"change rate, 2 of 64 experts over 2 of 16": ratio})


def _shares(results: Results, experiment: str) -> tuple[dict[str, list[float]], list[Replicate]]:
    runs = results.of(experiment, "grpo")
    names = {
        "token": "ratio/token_routing_variance_share",
        "sequence": "ratio/sequence_routing_variance_share",
        "changed": "ratio/token_log_std_changed",
        "unchanged": "ratio/token_log_std_unchanged",
        "token_std": "ratio/token_natural_log_std",
        "sequence_std": "ratio/sequence_natural_log_std",
        "length": "response/length_mean",
    }
    return {key: [run.mean(name) for run in runs.values()] for key, name in names.items()}, list(runs)


def routing_moves_token_ratios(results: Results) -> Answer:
    """Claim 5, tokens."""
    values, replicates = _shares(results, "common")
    if (problem := too_few(replicates)) is not None:
        return Answer(Verdict.OPEN, problem)
    share = mean_of(values["token"])
    wider = ratio_of_means(values["changed"], values["unchanged"])
    verdict = Verdict.NOT_TESTABLE
    if share.surely_above(LEAST_ROUTING_SHARE):
        verdict = Verdict.REPRODUCED
    elif share.surely_below(LEAST_ROUTING_SHARE):
        verdict = Verdict.NOT_REPRODUCED
    estimates = {"routing's share of the variance of log w": share}
    told = f"routing makes {shown(share, percent=True)} of the variance of log w"
    if wider is not None:
        estimates["spread of log w, rerouted tokens over others"] = wider
        told += f"; rerouted tokens' log w is spread {shown(wider)} times as wide as others'"
    return Answer(verdict, told, estimates)


def routing_hardly_moves_sequences(results: Results) -> Answer:
    """Claim 5, sequences: beyond what averaging independent tokens does, which leaves the share as it is."""
    values, replicates = _shares(results, "common")
    if (problem := too_few(replicates)) is not None:
        return Answer(Verdict.OPEN, problem)
    return _moves_sequences(values)


def routing_hardly_moves_longer_sequences(results: Results) -> Answer:
    """The same where responses are nearly twice as long."""
    values, replicates = _shares(results, "long")
    if len(replicates) < MIN_DEPTH_REPLICATES:
        return Answer(Verdict.OPEN, f"fewer than {MIN_DEPTH_REPLICATES} replicates have run")
    return _moves_sequences(values)


def _moves_sequences(values: dict[str, list[float]]) -> Answer:
    ratio = ratio_of_means(values["sequence"], values["token"])
    if ratio is None:
        return Answer(Verdict.NOT_TESTABLE, "routing moved no token's ratio")
    verdict = Verdict.NOT_TESTABLE
    if ratio.surely_below(HARDLY):
        verdict = Verdict.REPRODUCED
    elif ratio.surely_above(HARDLY):
        verdict = Verdict.NOT_REPRODUCED
    narrower = ratio_of_means(values["token_std"], values["sequence_std"])
    told = (
        f"routing's share of the variance of log s is {shown(mean_of(values['sequence']), percent=True)}, "
        f"{shown(ratio)} of its share in log w"
    )
    estimates = {"routing's share in log s over that in log w": ratio}
    if narrower is not None:
        root = float(np.sqrt(np.mean(values["length"])))
        told += (
            f"; log s is spread {shown(narrower)} times narrower than log w (averaging independent tokens: {root:.2f})"
        )
        estimates["spread of log w over log s"] = narrower
    return Answer(verdict, told, estimates)
