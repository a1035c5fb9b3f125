"""What a run takes of a GPU's memory, on paper: from the recipe and the model's `config.json` alone.

In: a recipe. Out: a `MemoryEstimate`, part by part for the rank that needs most. Needs neither CUDA nor Megatron nor
PyTorch, so that it runs on a login node. Parameters, gradients and optimizer states are exact (tests compare them with
what real ranks allocate); activations follow from what the layers keep; the rest is stated where it is reckoned.
"""

from megatron_gspo.memory.estimate import GIB, MemoryEstimate, RankMemory, estimate
from megatron_gspo.memory.layouts import Layout, fitting_layouts, possible_layouts
from megatron_gspo.memory.shapes import ModelShapes

__all__ = [
    "GIB",
    "Layout",
    "MemoryEstimate",
    "ModelShapes",
    "RankMemory",
    "estimate",
    "fitting_layouts",
    "possible_layouts",
]
