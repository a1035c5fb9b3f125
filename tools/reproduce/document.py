"""Writes what the study came to: RESULTS.md with its PNGs, results.json, and comparison pages.

In: run directories that have ended. Out, in the output directory (and RESULTS.md with PNGs where they are published):

    RESULTS.md, results/*.png        the answers, and what they rest on
    results.json                     every estimate with its intervals
    comparison_EXPERIMENT.html       `megatron-gspo compare` of the experiment's runs
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_gspo.report.comparison import compare
from tools.reproduce.answers import MARGIN, Answer, shown
from tools.reproduce.claims import CLAIMS
from tools.reproduce.figures import draw_all
from tools.reproduce.intervals import mean_of
from tools.reproduce.measure import Outcome, Results, read_results
from tools.reproduce.plan import specs_of
from tools.reproduce.study import ARMS, COLD_STARTS, LEARNING_RATES, MODELS, Experiment

COMPARED = ("common", "best", "off_policy", "clip", "engine")
TITLES = {
    "1": "GSPO against GRPO",
    "2": "Clip fractions",
    "3": "Routing Replay",
    "4": "How many experts change",
    "5": "What routing does to the ratios",
    "6": "The engine's likelihoods",
}


def write_results(experiments: Sequence[Experiment], output: Path, command: str, publish: Path | None = None) -> None:
    """Answer every claim that the experiments are for, write the files, and print the answers."""
    results = read_results(experiments, output)
    numbers = {number for experiment in experiments for number in experiment.claims}
    claims = [claim for claim in CLAIMS if claim.id[0] in numbers]
    answers = {claim.id: claim.answer(results) for claim in claims}
    pictures = draw_all(results, answers, output / "results")
    pages = _write_pages(results, output)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("RESULTS.md.j2").render(
        command=command,
        claims=claims,
        answers=answers,
        titles={number: title for number, title in TITLES.items() if number in numbers},
        pictures=pictures,
        facts=_facts(results),
        r3=_r3_beside_r2(results),
        arms=[_arms_table(results, experiment) for experiment in experiments if results.num_runs(experiment.name)],
        sweeps=[_sweep_table(results, name) for name in ("sweep", "dense") if results.num_runs(name)],
        shown=shown,
        student=_student,
        margin=MARGIN,
    )
    (output / "RESULTS.md").write_text(text.strip() + "\n")
    (output / "results.json").write_text(json.dumps(_as_json(answers), indent=2, allow_nan=False) + "\n")
    if publish is not None:
        shutil.rmtree(publish / "results", ignore_errors=True)
        shutil.copytree(output / "results", publish / "results")
        shutil.copyfile(output / "RESULTS.md", publish / "RESULTS.md")
    for claim in claims:
        print(f"{claim.id}  {claim.text}: {answers[claim.id].verdict.upper()}\n      {answers[claim.id].sentence}")
    for page in pages:
        print(f"Curves: {page}")
    print(f"Results: {output / 'RESULTS.md'}")


def _write_pages(results: Results, output: Path) -> list[Path]:
    """A comparison page for each experiment: of the replicates that all arms with runs have, so that arms pair up."""
    pages = []
    for name in COMPARED:
        experiment = results.experiments.get(name)
        if experiment is None:
            continue
        arms = [runs for arm in experiment.arms if (runs := results.of(name, arm))]
        common = set.intersection(*(set(runs) for runs in arms)) if len(arms) > 1 else set()
        paths = [runs[key].directory for runs in arms for key in sorted(common)]
        if paths:
            compare(paths, output / f"comparison_{name}.html")
            pages.append(output / f"comparison_{name}.html")
    return pages


def _facts(results: Results) -> dict[str, Any]:
    """How many runs there are of how many, what they took, and what they ran with."""
    planned = {
        spec.name for experiment in results.experiments.values() for spec in specs_of(experiment, results.best_rate)
    }
    outcomes = list(results.outcomes.values())
    undecided = sum(
        len(experiment.replicates)
        for experiment in results.experiments.values()
        if not experiment.learning_rates
        for arm in experiment.arms
        if results.best_rate(arm) is None
    )
    typical = [
        run.cpu_s
        for name, run in results.outcomes.items()
        if name.startswith("moe_8/") and "16_updates" not in name and not run.resumed
    ]
    environments = [run.record.environment for run in outcomes]
    starts: dict[tuple[str, int], list[float]] = {}
    for name, run in results.outcomes.items():
        starts.setdefault((name.partition("/")[0], int(name.rpartition("_")[2])), []).append(run.start)
    return {
        "num_runs": len(outcomes),
        "num_planned": len(planned) + undecided,
        "cpu_minutes": sum(run.cpu_s for run in outcomes) / 60,
        "median_cpu_s": float(np.median(typical)) if typical else None,
        "num_collapsed": sum(run.collapsed for run in outcomes),
        "python": sorted({str(one.get("python")) for one in environments}),
        "packages": dict(environments[0]["packages"]) if environments else {},
        "commits": sorted({str(one.get("git_commit"))[:12] for one in environments}),
        "starts": [(*key, float(np.mean(found))) for key, found in sorted(starts.items())],
        "models": MODELS,
        "cold_starts": COLD_STARTS,
    }


def _r3_beside_r2(results: Results) -> tuple[int, int]:
    """Of the pairs of R3 and R2 with a float32 engine: how many have equal rewards in every step, and how many there are."""
    r2, r3 = results.of("common", "grpo_r2"), results.of("r3", "grpo_r3")
    equal = [np.array_equal(r2[key].reward, r3[key].reward) for key in r3 if key in r2]
    return sum(equal), len(equal)


def _arms_table(results: Results, experiment: Experiment) -> dict[str, Any]:
    """A row an arm (and model, where there are several): means over its replicates."""
    rows = []
    for model in experiment.models:
        for arm in experiment.arms:
            if len(experiment.learning_rates) > 1:
                continue  # the sweep has a table of its own
            runs = list(results.of(experiment.name, arm, model=model).values())
            if runs:
                label = ARMS[arm].title + (f", {model}" if len(experiment.models) > 1 else "")
                rows.append(_row(label, runs, experiment, results.best_rate(arm)))
    return {"title": experiment.title, "rows": rows, "num_runs": results.num_runs(experiment.name)}


def _row(label: str, runs: list[Outcome], experiment: Experiment, best: float | None) -> list[str]:
    def mean(metric: str, text: str) -> str:
        value = float(np.mean([run.mean(metric) for run in runs]))
        return "–" if math.isnan(value) else text.format(value)

    rate = experiment.learning_rates[0] if experiment.learning_rates else best
    return [
        label,
        f"{rate:g}",
        str(len(runs)),
        f"{np.mean([run.start for run in runs]):.2f} → {np.mean([run.final_evaluation for run in runs]):.2f}",
        shown(mean_of([run.mean_reward for run in runs])),
        shown(mean_of([run.end_reward for run in runs])),
        f"{sum(run.collapsed for run in runs)}",
        mean("clip/token_fraction", "{:.3%}"),
        mean("routing/change_rate_after_update_1", "{:.2%}"),
        mean("routing/change_rate", "{:.2%}"),
        mean("mismatch/sequence_log_std", "{:.1e}"),
    ]


def _sweep_table(results: Results, name: str) -> dict[str, Any]:
    """End reward by learning rate, and how many runs collapsed."""
    experiment = results.experiments[name]
    rows = []
    for arm in experiment.arms:
        cells = []
        for rate in LEARNING_RATES:
            runs = list(results.of(name, arm, rate=rate).values())
            collapsed = sum(run.collapsed for run in runs)
            text = f"{np.mean([run.end_reward for run in runs]):.2f}" if runs else "–"
            cells.append(text + (f" ({collapsed} of {len(runs)} collapsed)" if collapsed else ""))
        best = results.best_rate(arm) if name == "sweep" else None
        rows.append([ARMS[arm].title, *cells, f"{best:g}" if best is not None else "–"])
    return {"title": experiment.title, "rates": [f"{rate:g}" for rate in LEARNING_RATES], "rows": rows}


def _student(estimate: Any) -> str:
    if estimate.student_low is None or estimate.student_high is None:
        return "–"
    return f"[{estimate.student_low:.3g}, {estimate.student_high:.3g}]"


def _as_json(answers: dict[str, Answer]) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        claim: {
            "verdict": str(answer.verdict),
            "sentence": answer.sentence,
            "estimates": {
                label: {key: finite(value) for key, value in dataclasses.asdict(estimate).items()}
                for label, estimate in answer.estimates.items()
            },
        }
        for claim, answer in answers.items()
    }
