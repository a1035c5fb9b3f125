"""The `megatron-gspo` program.

In: arguments. Out: an exit status: 0 done; 1 failed; 2 bad recipe, arguments or input data, said in one line; 75 stopped
as a signal asked or because no rollout engine is left, to be gone on with. What a command needs is imported when it runs, and what can be refused without
PyTorch is refused before PyTorch is imported: `--help` and most mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gspo import __version__, launch
from megatron_gspo.slurm import arguments as slurm_arguments

if TYPE_CHECKING:
    from megatron_gspo.config import Recipe

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
EXIT_STOPPED = launch.EXIT_STOPPED

PROGRESS_LOGGER = "megatron_gspo.progress"  # what the display shows anyway; for log.txt alone

RECIPE_HELP = "a recipe, a YAML file; then any number of section.field=value to change it"


def build_parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = argparse.ArgumentParser(
        prog="megatron-gspo",
        description="Reinforcement learning of Mixture-of-Experts language models with GSPO and GRPO on Megatron-Core.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-gspo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _recipe_command(commands, "train", "train a policy with reinforcement learning")
    train.add_argument("--output-dir", type=Path, required=True, metavar="RUN", help="the run directory to write")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    train.add_argument("--resume-from", type=int, metavar="STEP", help="go on from the checkpoint of this step instead")
    train.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="launch N ranks on this machine, one of those that srun started this on (slurm/train.sbatch does)",
    )
    train.add_argument(
        "--servers", type=Path, metavar="DIR", help="sample from the SGLang servers that `serve` has put into DIR"
    )

    serve = _recipe_command(commands, "serve", "SGLang servers for a `train --servers DIR` on this or other machines")
    serve.add_argument("--servers", type=Path, required=True, metavar="DIR", help="holds `key`; serves until that goes")
    serve.add_argument("--log-dir", type=Path, required=True, metavar="LOGS", help="for what the servers say")

    warmstart = _recipe_command(commands, "warmstart", "supervised cold start: train on demonstrations")
    warmstart.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")

    evaluate = _recipe_command(commands, "evaluate", "pass@1 (mean over n samples) and pass@k on data.eval")
    evaluate.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint directory"
    )

    report = commands.add_parser("report", help="one HTML page about a run: what it came to, warnings, figures")
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.add_argument("--output", type=Path, metavar="FILE.html", help="default: RUN/report.html")

    compare = commands.add_parser("compare", help="one HTML page about several runs, grouped by recipe")
    compare.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories; seeds of one recipe are an arm"
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison.html"), metavar="FILE.html", help="default: comparison.html"
    )
    compare.add_argument("--reward", type=float, metavar="R", help="count the steps to this reward (default: half-way)")
    compare.add_argument("--json", action="store_true", help="write the numbers as JSON too, beside the page")
    compare.add_argument("--csv", action="store_true", help="write a line a run as CSV too, beside the page")
    compare.add_argument("--anyway", action="store_true", help="compare runs of different tasks too")

    slurm_arguments.add_submit(_recipe_command(commands, "submit", "train on a SLURM cluster"))
    slurm_arguments.add_status(commands.add_parser("status", help="how submitted runs are getting on"))

    commands.add_parser("doctor", help="what this machine has, what will be used, what is missing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(given)
    _set_up_logging()
    from megatron_gspo.types import TrainingFailedError, UserError

    commands: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "train": _train,
        "serve": _serve,
        "warmstart": _warmstart,
        "evaluate": _evaluate,
        "report": _report,
        "compare": _compare,
        "submit": _submit,
        "status": _status,
        "doctor": _doctor,
    }
    try:
        status = commands[parsed.command](parsed, given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return EXIT_FAILED
    except UserError as error:
        if not error.said_elsewhere:
            print(f"megatron-gspo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except TrainingFailedError as error:
        if _is_first_rank() or not error.of_all_ranks:
            print(f"megatron-gspo: {error}", file=sys.stderr)
        return EXIT_FAILED


def _nobody_reads() -> bool:
    """Whether who read our output has left, as in `doctor | head`; what is still written then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are told unasked
    has_left = any(event & select.POLLERR for _, event in output.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def parse(given: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for; a recipe's fields may stand anywhere behind it.

    argparse alone takes them where they stand together, and leaves over those that follow an option.

    Raises:
        SystemExit: with status 2, of arguments that no command takes.
    """
    parser = build_parser()
    parsed, left_over = parser.parse_known_args(given)
    takes_fields = "overrides" in parsed
    unknown = [word for word in left_over if not takes_fields or word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_fields:
        parsed.overrides += left_over
    return parsed


def _set_up_logging() -> None:
    """What this project logs goes to the terminal, from the first rank alone; of libraries only warnings do."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO if _is_first_rank() else logging.ERROR)
    handler.addFilter(
        lambda record: (
            record.levelno >= logging.WARNING
            or (record.name.startswith("megatron_gspo") and record.name != PROGRESS_LOGGER)
        )
    )
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.captureWarnings(True)
    # torch announces new names of collectives that Megatron-Core 0.16 calls by the old ones, and warns of a gradient
    # that its optimizer (optimizer.py) only asks whether it is there.
    for message in ("`torch.distributed.*` is deprecated", "The .grad attribute of a Tensor that is not a leaf"):
        warnings.filterwarnings("ignore", message=message)


def _recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description.capitalize() + ".")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes one field of the recipe")
    return parser


def _train(parsed: argparse.Namespace, given: list[str]) -> int:
    launch.hold_stop_signals()  # until the run, or the launcher of its ranks, listens to them
    recipe = _load(parsed)
    resume = parsed.resume or parsed.resume_from is not None
    if parsed.servers is not None and recipe.rollout.engine != "sglang":
        from megatron_gspo.types import UserError

        raise UserError(f"--servers: rollout.engine is {recipe.rollout.engine}; accepted: sglang")
    if _is_started_plainly():
        from megatron_gspo.report.metrics import refuse_used_directory

        if not resume:
            refuse_used_directory(parsed.output_dir)
        _refuse_early(recipe)

    def run(recipe: Recipe) -> int:
        with _importing():
            from megatron_gspo.training.loop import train

        finished = train(
            recipe, parsed.output_dir, resume=resume, resume_from=parsed.resume_from, servers=parsed.servers
        )
        return EXIT_DONE if finished else EXIT_STOPPED

    return _on_ranks(recipe, given, run, parsed.ranks_per_node)


def _serve(parsed: argparse.Namespace, given: list[str]) -> int:
    del given
    launch.hold_stop_signals()  # for good, and before imports start threads: servers end after the ranks
    recipe = _load(parsed)
    from megatron_gspo.platform import device
    from megatron_gspo.rollout.serve import serve

    node = launch.node_of_this_process() or launch.Node()
    serve(recipe, parsed.servers.resolve(), parsed.log_dir.resolve(), node, on_cpu=device().type == "cpu")
    return EXIT_DONE


def _warmstart(parsed: argparse.Namespace, given: list[str]) -> int:
    recipe = _load(parsed)
    if _is_started_plainly():
        from megatron_gspo.report.metrics import refuse_used_checkpoint

        refuse_used_checkpoint(parsed.output_dir)
        _refuse_early(recipe)

    def run(recipe: Recipe) -> int:
        with _importing():
            from megatron_gspo.training.warmstart import warmstart

        warmstart(recipe, parsed.output_dir)
        return EXIT_DONE

    return _on_ranks(recipe, given, run)


def _evaluate(parsed: argparse.Namespace, given: list[str]) -> int:
    parsed.overrides.append(f"model.path={parsed.checkpoint}")
    recipe = _load(parsed)
    if _is_started_plainly():
        _refuse_early(recipe)

    def run(recipe: Recipe) -> int:
        with _importing():
            from megatron_gspo.training.evaluation import evaluate_checkpoint

        evaluate_checkpoint(recipe)
        return EXIT_DONE

    return _on_ranks(recipe, given, run)


def _report(parsed: argparse.Namespace, given: list[str]) -> int:
    del given
    from megatron_gspo.report.page import print_page
    from megatron_gspo.report.run_report import write_report

    page, where = write_report(parsed.run, parsed.output)
    print_page(page, figures_at=where)
    return EXIT_DONE


def _compare(parsed: argparse.Namespace, given: list[str]) -> int:
    del given
    from megatron_gspo.report.comparison import compare
    from megatron_gspo.report.page import print_page

    page, (where, *others) = compare(
        parsed.runs,
        parsed.output,
        target_reward=parsed.reward,
        anyway=parsed.anyway,
        as_json=parsed.json,
        as_csv=parsed.csv,
    )
    print_page(page, figures_at=where)
    for other in others:
        print(f"Numbers: {other}")
    return EXIT_DONE


def _submit(parsed: argparse.Namespace, given: list[str]) -> int:
    del given
    from megatron_gspo.slurm.submit import submit

    submit(slurm_arguments.read_submit(parsed))
    return EXIT_DONE


def _status(parsed: argparse.Namespace, given: list[str]) -> int:
    del given
    from megatron_gspo.slurm.status import print_status

    print_status(parsed.target)
    return EXIT_DONE


def _doctor(parsed: argparse.Namespace, given: list[str]) -> int:
    del parsed, given
    from megatron_gspo.doctor import examine

    return EXIT_DONE if examine() else EXIT_FAILED


def _load(parsed: argparse.Namespace) -> Recipe:
    from megatron_gspo.config import load_recipe

    return load_recipe(parsed.recipe, parsed.overrides)


def _refuse_early(recipe: Recipe) -> None:
    """Refuse what needs no rank to be refused. Every rank does so again, since data may lie on disks of their own."""
    from megatron_gspo.config import require_data_files
    from megatron_gspo.reward.registry import BY_PROBLEM, reward_import_path
    from megatron_gspo.rollout.environments import environment_import_path

    require_data_files(recipe)
    if recipe.environment.name is not None:
        environment_import_path(recipe.environment.name)
    if recipe.reward.name != BY_PROBLEM:
        reward_import_path(recipe.reward.name)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """A block that imports much, without Python's collector of cycles.

    Next to nothing dies while modules are imported, but collections would search all that there is again and again: a
    seventh of the start's CPU time. What is there afterwards stays until the end, so later collections pass over it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_started_plainly() -> bool:
    return not launch.place_of_this_process().launched


def _is_first_rank() -> bool:
    return launch.place_of_this_process().rank == 0


def _on_ranks(recipe: Recipe, given: list[str], run: Callable[[Recipe], int], ranks_per_node: int | None = None) -> int:
    """Run `run` on every rank the recipe needs: as one of them, or by starting them on this machine first.

    With `ranks_per_node` that many are started here, the other machines' by the same program there. A rank that fails
    leaves at once: its words are out before the others notice that it is gone, and complain.
    """
    from megatron_gspo.config import recipe_for_world_size

    node = launch.node_of_this_process()
    if ranks_per_node is not None and node is not None:
        return launch.run_ranks(ranks_per_node, given, node)
    place = launch.place_of_this_process()
    if place.launched:
        recipe = recipe_for_world_size(recipe, place.world_size)
    elif recipe.parallel.world_size > 1:
        return launch.run_ranks(recipe.parallel.world_size, given)
    with _importing():
        from megatron_gspo import parallel

    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    status = run(recipe)
    parallel.shutdown()
    return status
