"""`megatron-gspo doctor`: what this machine has, what will be used, what is missing and how to get it.

In: the machine. Out: a table on the terminal, and whether training can run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_gspo.environment import package_version
from megatron_gspo.platform import Machine, detect_machine

REQUIRED = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers", "math-verify")


class Status(Enum):
    """What a line of the table amounts to."""

    OK = "[green]ok[/]"
    OPTIONAL = "-"
    MISSING = "[bold red]missing[/]"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str | None  # None where it is not there
    meaning: str
    required: bool = False

    @property
    def status(self) -> Status:
        """Whether it is there, and whether training needs it."""
        if self.found is not None:
            return Status.OK
        return Status.MISSING if self.required else Status.OPTIONAL


def examine() -> bool:
    """Print the table. True where nothing that training needs is missing."""
    machine = detect_machine()
    findings = [*_packages(), *_accelerators(machine), *_host(machine)]
    table = Table(title="megatron-gspo doctor", title_justify="left")
    for column in ("", "what", "found", "what it means"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.status.value, finding.what, escape(finding.found or "not installed"), escape(finding.meaning)
        )
    Console().print(table)
    missing = [finding.what for finding in findings if finding.status is Status.MISSING]
    if missing:
        print(f"Training cannot run here: {', '.join(missing)} missing.")
    else:
        print("Training can run here. Try: megatron-gspo train recipes/tiny_gspo.yaml --output-dir runs/tiny_gspo")
    return not missing


def _packages() -> list[Finding]:
    versions = {name: package_version(name) for name in REQUIRED}
    findings = [
        Finding(name, version, "" if version else f"pip install -c constraints.txt {name}", required=True)
        for name, version in versions.items()
    ]
    wandb = package_version("wandb")
    meaning = "logging.wandb_project can be used" if wandb else "pip install 'megatron-gspo[wandb]' to log there"
    return [*findings, Finding("wandb", wandb, meaning)]


def _accelerators(machine: Machine) -> list[Finding]:
    if machine.has_cuda:
        gpu = f"{machine.num_gpus} × {machine.gpu_name}, {machine.gpu_memory_gib:.0f} GiB"
        used = f"ranks run on the GPUs and talk through {machine.backend}"
    else:
        gpu, used = "none", "ranks run on the CPU and talk through gloo: small models, the same code"
    return [
        Finding("GPU", gpu, used),
        Finding(
            "Transformer Engine",
            machine.transformer_engine,
            "model.spec: auto builds its layers"
            if machine.transformer_engine
            else "model.spec: auto builds this project's own layers; it comes with NVIDIA's containers, or "
            "pip install 'megatron-gspo[gpu]' beside a CUDA toolkit",
        ),
        Finding(
            "NVIDIA Apex",
            "found" if machine.apex else None,
            "Megatron uses its fused optimizer"
            if machine.apex
            else "torch's AdamW is used; it comes with NVIDIA's containers (`apex` in the package index is another project)",
        ),
    ]


def _host(machine: Machine) -> list[Finding]:
    return [
        Finding("CPU", f"{machine.num_cores} cores", "one rank a core is a good start where there is no GPU"),
        Finding("memory", f"{machine.memory_gib:.0f} GiB", "the tiny recipes take about 1 GiB a rank"),
    ]
