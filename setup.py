"""Package metadata. `constraints.txt` pins the versions the project is tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_gspo/__init__.py").read_text())[1]

setup(
    name="megatron-gspo",
    version=VERSION,
    description="GSPO and GRPO with Routing Replay on Megatron-Core, and the measurement of expert volatility",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_gspo", "megatron_gspo.*"]),
    package_data={"megatron_gspo": ["py.typed"], "megatron_gspo.report": ["templates/*"]},
    # SGLang is none of them: it runs in an environment of its own (its pins differ), and is spoken to over HTTP.
    install_requires=[
        "torch>=2.13",
        # What runs without CUDA was established on 0.16; platform.py names the files of this release.
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.0",
        "safetensors",
        "tokenizers",
        "numpy",
        "pydantic>=2.10",
        "PyYAML",
        "rich",
        "tensorboard",
        "plotly",
        "Jinja2",
        "pyarrow",
        "math-verify",
        "httpx",
        "xxhash",
    ],
    extras_require={
        # Transformer Engine is built against the machine's CUDA. NVIDIA Apex is detected, never required: the
        # project named `apex` on PyPI is another one.
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "wandb": ["wandb"],
        "dev": ["matplotlib", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "mypy", "ruff", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["megatron-gspo = megatron_gspo.cli:main"]},
)
