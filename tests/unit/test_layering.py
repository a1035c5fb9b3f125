"""Imports point one way: what each part of the package may import of the rest."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_gspo"

FOUNDATION = {"types", "names", "import_path", "config"}
MACHINE = FOUNDATION | {"platform", "launch", "parallel", "context_parallel", "gloo"}
SIBLINGS = ("model", "rollout", "reward", "data", "routing", "policy_loss")

ALLOWED = {
    "types": set(),
    "names": {"types"},
    "import_path": {"types", "names"},
    "config": FOUNDATION,
    # A plan is made on login nodes: without PyTorch, Megatron or a GPU.
    "memory": FOUNDATION | {"memory"},
    "platform": FOUNDATION,
    "parallel": MACHINE,
    "context_parallel": set(),
    "gloo": set(),
    **{sibling: MACHINE | {sibling} for sibling in SIBLINGS},
    "report": {"types", "report"},
    "environment": {"platform", "types"},
    "training": MACHINE | set(SIBLINGS) | {"training", "environment"},
    "launch": set(),
    "slurm": FOUNDATION | {"memory", "slurm"},
    "doctor": {"platform", "environment", "types"},
}
# The training loop writes what reports read, and `status` reads the newest of it; nothing else is their business.
MAY_IMPORT_OF_REPORT = {
    "training": {"megatron_gspo.report.metrics", "megatron_gspo.report.run_report"},
    "slurm": {"megatron_gspo.report.metrics"},
}


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(node.module or "")
            if node.module == "megatron_gspo":
                found |= {f"megatron_gspo.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("megatron_gspo.")}


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_below_it(part: str):
    directory = PACKAGE / part
    files = sorted(directory.rglob("*.py")) if directory.is_dir() else [PACKAGE / f"{part}.py"]
    for file in files:
        for module in imported_modules(file):
            if module in MAY_IMPORT_OF_REPORT.get(part, set()):
                continue
            allowed = ALLOWED[part]
            # `from megatron_gspo import __version__` names no part.
            if module == "megatron_gspo.__version__":
                continue
            assert part_of(module) in allowed, f"{file.relative_to(PACKAGE)} imports {module}"


def test_every_part_of_the_package_has_its_place():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - set(ALLOWED) == {"__init__", "__main__", "cli"}


def test_sglang_is_imported_by_its_launcher_alone():
    """SGLang has an environment of its own, with other versions than the trainer's."""
    importing = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] == "sglang"
    }
    assert importing == {"rollout/sglang_launcher.py"}
