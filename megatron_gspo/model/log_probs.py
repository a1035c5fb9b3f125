"""From final hidden states to the log-probability and entropy of every response token.

In: the hidden states that predict response tokens, and this rank's rows of the output layer. Out: log π(target) and the
entropy of π, both at the sampling temperature, because that is the distribution a rollout engine sampled from; the
importance ratios of eqs. 3, 8 and 15 are differences of these log-probs.

Logits exist for one chunk of tokens at a time, in the forward pass and again, recomputed, in the backward pass: with a
vocabulary of 151,936 the full matrix would take 0.6 MB a token, several times over. Both passes are written out below
because autograd would keep every chunk's logits alive until the backward pass.

Shape legend: T tokens, C tokens of a chunk, H hidden size, V vocabulary, R rows of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_CACHED_LOGITS = 2**17
"""Half a MiB in float32: with its exponentials, what a CPU core's second-level cache holds."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    with_entropy: bool = True,
    vocabulary_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of the distribution it was drawn from, at `temperature`.

    Args:
        hidden: [T, H] float32 or bfloat16, what the output layer reads. T may be 0; the graph stays connected.
        weight: [R, H], this rank's rows of the output layer; ranks hold equally many, in rank order. Where Megatron's
            data-parallel wrapper has given it a float32 `main_grad`, its gradient is added to that (see Returns).
        targets: [T] int64, token ids in the whole vocabulary.
        temperature: logits are divided by it; above 0.
        chunk_tokens: tokens whose logits exist at one time.
        tensor_parallel_group: the ranks among which the vocabulary is divided; None when this rank has all of it.
            Every rank of the group passes the same hidden states and targets.
        with_entropy: also return the entropy; without it the forward pass saves one pass over the logits.
        vocabulary_size: V where the last of all rows are padding, which then have no probability and no gradient;
            None when every row is a token.

    Returns:
        Log-probs [T] and entropies [T] in nats (None without `with_entropy`), float32 (float64 for float64 input).
        Gradients flow through both. The gradient of `hidden` is the part owed to this rank's rows: whatever gave
        `hidden` to all ranks of the group sums it over them, as for any column-parallel layer. What autograd is handed
        for a weight with a `main_grad` means nothing: as after Megatron's own fused layers, `grad_added_to_main_grad`
        says that the wrapper has nothing left to add, so within a step nothing but an embedding tied to it may give such a
        weight a gradient in another way.

    Under tensor parallelism all ranks of the group must call this and pass the same gradients back, which follows when
    they compute the same loss. The backward pass relies on it: each rank by itself leaves out the tokens whose incoming
    gradients are exactly 0 (clipped responses, groups of equal rewards), and it communicates nothing.
    """
    assert temperature > 0, "log-probs of greedy sampling are taken at temperature 1"
    shard = _VocabularyShard.of(weight, tensor_parallel_group, vocabulary_size)
    if targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        assert 0 <= low <= high < shard.vocabulary_size, "a target lies outside the vocabulary"
    log_probs, entropy = _TokenLogProbs.apply(hidden, weight, targets, shard, temperature, chunk_tokens, with_entropy)
    return log_probs, entropy


@dataclass(frozen=True)
class _VocabularyShard:
    """Which tokens this rank's rows stand for."""

    group: dist.ProcessGroup | None
    first: int  # token id of this rank's first row
    num_rows: int  # R without padding; may be 0 on the last ranks of a small vocabulary
    vocabulary_size: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None, vocabulary_size: int | None) -> _VocabularyShard:
        rank, num_ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        num_padded_rows = weight.shape[0]
        vocabulary_size = num_ranks * num_padded_rows if vocabulary_size is None else vocabulary_size
        assert vocabulary_size <= num_ranks * num_padded_rows, (
            "the shards hold fewer rows than the vocabulary has tokens"
        )
        first = rank * num_padded_rows
        return cls(group, first, min(max(vocabulary_size - first, 0), num_padded_rows), vocabulary_size)

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's row here (0 where another rank has it), and whether this rank has it."""
        rows = targets - self.first
        owned = (rows >= 0) & (rows < self.num_rows)
        return rows.where(owned, 0), owned


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    needs_input_grad: tuple[bool, ...]
    shard: _VocabularyShard
    temperature: float
    chunk_tokens: int
    parameter: Tensor  # the weight itself, which an unpacked saved tensor need not be
    memory: Tensor | None  # `_memory_of_logits`, to be used again


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: _VocabularyShard,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = _rows_to_multiply(hidden, weight, shard)
        statistics = _Statistics.empty(hidden, rows)
        memory = None
        if shard.num_rows:
            memory = _memory_of_logits(rows, min(chunk_tokens, len(targets)))
            for start in range(0, len(targets), chunk_tokens):
                chunk = slice(start, min(start + chunk_tokens, len(targets)))
                logits = _scaled_logits(hidden[chunk], rows, temperature, memory)
                statistics.set_chunk(chunk, logits, *shard.locate(targets[chunk]), with_entropy)
        statistics.reduce(shard.group)

        log_normalizer = statistics.maximum + statistics.sum_exp.log()
        log_probs = statistics.target - log_normalizer
        # With s = logit - maximum: H = log Σe^s - Σ s·e^s / Σe^s.
        entropy = statistics.sum_exp.log() - statistics.weighted / statistics.sum_exp if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, log_normalizer, entropy)  # type: ignore[arg-type]  # None is allowed
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.temperature, ctx.chunk_tokens, ctx.parameter = shard, temperature, chunk_tokens, weight
        # A GPU's allocator hands memory out again, and has other uses for it before the backward pass.
        ctx.memory = memory if hidden.device.type == "cpu" and any(ctx.needs_input_grad) else None
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, _, _, log_normalizer, _ = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = _WeightGradient.of(ctx.parameter, log_normalizer.dtype) if needs_weight else None
        _add_gradients(ctx, grad_log_probs, grad_entropy, grad_hidden, grad_weight)
        return grad_hidden, None if grad_weight is None else grad_weight.for_autograd(), *(None,) * 5


def _add_gradients(
    ctx: _Context,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_hidden: Tensor | None,
    grad_weight: _WeightGradient | None,
) -> None:
    """Recompute the logits of the tokens that carry a gradient, chunk by chunk, and add what they owe."""
    hidden, weight, targets, log_normalizer, entropy = ctx.saved_tensors
    rows = _rows_to_multiply(hidden, weight, ctx.shard)
    carries_gradient = torch.zeros_like(targets, dtype=torch.bool)
    for gradient in (grad_log_probs, grad_entropy):
        if gradient is not None:
            carries_gradient |= gradient != 0
    tokens = carries_gradient.nonzero().squeeze(1)
    memory, ctx.memory = ctx.memory, None
    if memory is None:
        memory = _memory_of_logits(rows, min(ctx.chunk_tokens, len(tokens)))
    for start in range(0, len(tokens) if ctx.shard.num_rows else 0, ctx.chunk_tokens):
        chunk = tokens[start : start + ctx.chunk_tokens]
        hidden_chunk, normalizer_chunk = hidden[chunk], log_normalizer[chunk]
        of_log_probs = None if grad_log_probs is None else grad_log_probs[chunk]
        of_entropy = None if grad_entropy is None or entropy is None else (grad_entropy[chunk], entropy[chunk])
        grad_logits = _scaled_logits(hidden_chunk, rows, ctx.temperature, memory)
        target_rows, owned = ctx.shard.locate(targets[chunk])
        for part in _parts(grad_logits):
            _logits_to_gradient(
                grad_logits[part],
                normalizer_chunk[part],
                None if of_log_probs is None else of_log_probs[part],
                None if of_entropy is None else (of_entropy[0][part], of_entropy[1][part]),
                ctx.temperature,
            )
        if of_log_probs is not None:
            of_target = of_log_probs.where(owned, 0) / ctx.temperature
            grad_logits.scatter_add_(1, target_rows[:, None], of_target[:, None])
        grad_logits = grad_logits.to(rows.dtype)
        if grad_hidden is not None:
            grad_hidden[chunk] = (grad_logits @ rows).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.add(grad_logits, hidden_chunk.to(rows.dtype))


class _WeightGradient:
    """What chunks add to the gradient of the weight [R, H], in the precision of the logits whatever the weight's.

    Where the weight has a `main_grad` of that precision, there: a gradient of its own would be 1.2 GB for Qwen3-30B-A3B,
    made anew, rounded to the weight's precision and added by every micro-batch.
    """

    def __init__(self, weight: Tensor, total: Tensor, *, is_main: bool) -> None:
        self._weight = weight
        self._total = total  # [R, H], padding rows too
        self._is_main = is_main
        self._num_set = len(weight) if is_main else 0  # first rows that hold numbers, the others' memory is unset

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> _WeightGradient:
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if main_grad is not None and main_grad.dtype == dtype:
            return cls(weight, main_grad, is_main=True)
        return cls(weight, torch.empty_like(weight, dtype=dtype), is_main=False)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add a chunk's, from [C, rows without padding] and [C, H]."""
        num_rows = grad_logits.shape[1]
        total, beta = self._total[:num_rows], 1 if self._num_set else 0  # at 0 what `total` holds is not read
        if total.dtype == hidden.dtype:
            torch.addmm(total, grad_logits.t(), hidden, beta=beta, out=total)
        else:
            torch.addmm(total, grad_logits.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)
        self._num_set = max(self._num_set, num_rows)

    def for_autograd(self) -> Tensor | None:
        """What the backward pass returns for the weight."""
        if not self._is_main:
            self._total[self._num_set :].zero_()
            return self._total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's name
        # An embedding tied to the output layer has a gradient of its own, which Megatron adds: nothing may come to it.
        # Elsewhere the hook that starts a bucket's reduction wants to see a gradient, whatever is in it.
        return None if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like(self._weight)


@dataclass
class _Statistics:
    """What the log-probs and entropies of T tokens need to know of the logits: four numbers a token, [T] each."""

    maximum: Tensor  # m = max logit
    sum_exp: Tensor  # Σ e^(logit - m)
    weighted: Tensor  # Σ (logit - m) e^(logit - m)
    target: Tensor  # the target's logit; 0 on ranks that do not have it

    @classmethod
    def empty(cls, hidden: Tensor, rows: Tensor) -> _Statistics:
        """Those of a shard without rows. The maximum is finite, so that rescaling its zeros cannot give a NaN."""
        zeros = hidden.new_zeros(3, len(hidden), dtype=_logits_dtype(rows.dtype))
        return cls(torch.full_like(zeros[0], torch.finfo(zeros.dtype).min), *zeros)

    def set_chunk(self, chunk: slice, logits: Tensor, target_rows: Tensor, owned: Tensor, with_entropy: bool) -> None:
        """Fill in one chunk's; overwrites `logits` [C, R]."""
        self.target[chunk] = logits.gather(1, target_rows[:, None]).squeeze(1).where(owned, 0)
        for part in _parts(logits):
            tokens, shifted = slice(chunk.start + part.start, chunk.start + part.stop), logits[part]
            self.maximum[tokens] = shifted.amax(dim=1)
            shifted.sub_(self.maximum[tokens, None])
            exponentials = shifted.exp()
            self.sum_exp[tokens] = exponentials.sum(dim=1)
            if with_entropy:
                self.weighted[tokens] = exponentials.mul_(shifted).sum(dim=1)

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """From the shards' to the whole vocabulary's, in two collectives a call whatever the number of chunks."""
        if group is None or group.size() == 1 or not len(self.maximum):
            return
        shard_maximum = self.maximum
        self.maximum = shard_maximum.clone()
        dist.all_reduce(self.maximum, dist.ReduceOp.MAX, group=group)
        shift = shard_maximum - self.maximum
        scale = shift.exp()
        sums = torch.stack([scale * self.sum_exp, scale * (self.weighted + shift * self.sum_exp), self.target])
        dist.all_reduce(sums, group=group)
        self.sum_exp, self.weighted, self.target = sums


def _logits_to_gradient(
    logits: Tensor,
    log_normalizer: Tensor,
    grad_log_probs: Tensor | None,
    entropy_term: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> None:
    """Turn scaled logits z [C, R] into the gradient with respect to the unscaled ones, but for the target's own term.

    With log p = z - log Σe^z: ∂ log p_target / ∂z_j = 1[j = target] - p_j and ∂H / ∂z_j = -p_j (log p_j + H).
    """
    log_p = logits.sub_(log_normalizer[:, None])
    if entropy_term is None:
        assert grad_log_probs is not None
        log_p.exp_().mul_((grad_log_probs / -temperature)[:, None])
        return
    p = log_p.exp()
    grad_entropy, entropy = entropy_term
    # -p (g_H (log p + H) + g_log_p), the part in brackets as one multiplication and one addition
    constant = grad_entropy * entropy if grad_log_probs is None else grad_entropy * entropy + grad_log_probs
    log_p.mul_((grad_entropy / -temperature)[:, None]).sub_((constant / temperature)[:, None]).mul_(p)


def _parts(logits: Tensor) -> list[slice]:
    """The rows of `logits` [C, R], cut so that a part's stay in a CPU core's cache from one operation to the next.

    A GPU has no use for that: there all rows are one part.
    """
    num_rows, num_columns = logits.shape
    step = max(1, _CACHED_LOGITS // max(num_columns, 1)) if logits.device.type == "cpu" else max(num_rows, 1)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _rows_to_multiply(hidden: Tensor, weight: Tensor, shard: _VocabularyShard) -> Tensor:
    """The shard's rows without padding, in the dtype the products are made in.

    CUDA multiplies bfloat16 into float32 results. The CPU has no such product in torch 2.13, so there the rows are
    converted, once a pass.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return weight[: shard.num_rows].to(dtype if weight.is_cuda else _logits_dtype(dtype))


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _memory_of_logits(rows: Tensor, num_tokens: int) -> Tensor:
    """[num_tokens, R], for one chunk's logits after the other: new memory costs a CPU a page fault every 4 KiB."""
    return rows.new_empty(num_tokens, len(rows), dtype=_logits_dtype(rows.dtype))


def _scaled_logits(hidden: Tensor, rows: Tensor, temperature: float, memory: Tensor) -> Tensor:
    """Logits over temperature, [C, R] in float32 or wider, written to the first C rows of `memory`."""
    hidden, logits = hidden.to(rows.dtype), memory[: len(hidden)]
    if rows.dtype == logits.dtype:
        torch.mm(hidden, rows.t(), out=logits)
    else:
        torch.mm(hidden, rows.t(), out_dtype=logits.dtype, out=logits)
    return logits if temperature == 1 else logits.div_(temperature)
