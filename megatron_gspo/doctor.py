"""`megatron-gspo doctor`: what this machine has, what will be used, what is missing and how to get it.

In: the machine. Out: a table on the terminal, and whether training can run here.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_gspo.environment import package_version
from megatron_gspo.platform import Machine, detect_machine

REQUIRED = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers", "math-verify")


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    meaning: str
    fine: bool = True


def examine() -> bool:
    """Print the table. True where nothing that training needs is missing."""
    machine = detect_machine()
    findings = [*_packages(), *_accelerators(machine), *_host(machine)]
    table = Table(title="megatron-gspo doctor", title_justify="left")
    for column in ("", "what", "found", "what it means"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row("ok" if finding.fine else "[bold red]missing[/]", finding.what, finding.found, finding.meaning)
    Console().print(table)
    missing = [finding.what for finding in findings if not finding.fine]
    if missing:
        print(f"Training cannot run here: {', '.join(missing)} missing.")
    else:
        print("Training can run here. Try: megatron-gspo train recipes/tiny_gspo.yaml --output-dir runs/tiny_gspo")
    return not missing


def _packages() -> list[Finding]:
    findings = []
    for name in REQUIRED:
        version = package_version(name)
        meaning = "" if version else f"pip install -c constraints.txt {name}"
        findings.append(Finding(name, version or "not installed", meaning, fine=version is not None))
    wandb = package_version("wandb")
    meaning = "logging.wandb_project can be used" if wandb else "optional: pip install 'megatron-gspo[wandb]'"
    return [*findings, Finding("wandb", wandb or "not installed", meaning)]


def _accelerators(machine: Machine) -> list[Finding]:
    if machine.has_cuda:
        gpu = f"{machine.num_gpus} × {machine.gpu_name}, {machine.gpu_memory_gib:.0f} GiB"
        used = f"ranks run on the GPUs and talk through {machine.backend}"
    else:
        gpu, used = "none", "ranks run on the CPU and talk through gloo: small models, the same code"
    engine = machine.transformer_engine
    return [
        Finding("GPU", gpu, used),
        Finding(
            "Transformer Engine",
            engine or "not installed",
            "model.spec: auto builds its layers"
            if engine
            else "model.spec: auto builds this project's own layers; Transformer Engine comes with NVIDIA's containers, "
            "or pip install 'megatron-gspo[gpu]' beside a CUDA toolkit",
        ),
        Finding(
            "NVIDIA Apex",
            "found" if machine.apex else "not installed",
            "Megatron uses its fused optimizer"
            if machine.apex
            else "torch's AdamW is used; Apex comes with NVIDIA's containers (the `apex` of the package index is another project)",
        ),
    ]


def _host(machine: Machine) -> list[Finding]:
    return [
        Finding("CPU", f"{machine.num_cores} cores", "one rank a core is a good start where there is no GPU"),
        Finding("memory", f"{machine.memory_gib:.0f} GiB", "the tiny recipes need 2 GiB a rank"),
    ]
