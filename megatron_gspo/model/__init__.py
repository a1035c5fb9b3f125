"""The policy: a Qwen3 or Qwen3-MoE model on Megatron-Core, its weights, and its log-probs."""

from megatron_gspo.platform import prepare_megatron

# Every module of this package may import `megatron.core` because this has run before.
prepare_megatron()
