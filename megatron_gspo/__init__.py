"""Reinforcement learning of Mixture-of-Experts language models with GSPO and GRPO on Megatron-Core."""

__version__ = "0.1.0"
