"""Rollouts: from prompts and the policy's weights to sampled responses.

`engine.RolloutEngine` says what the training loop may ask of any engine; `local.LocalEngine` is the one that lives in the
trainer's process, `sglang.SglangEngine` that of servers. `multi_turn.MultiTurn` samples from either, turn by turn, where
an environment answers (`environments.Environment`). Nothing is imported here: what finds environments needs no PyTorch.
"""
