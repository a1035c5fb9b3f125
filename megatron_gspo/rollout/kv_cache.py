"""A key-value cache for batches whose rows multiply after the prompt and leave when their response is finished."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, capacity, head_dim], of which the first `length` columns are filled.

    The capacity doubles when it runs out, so a step writes its own column; `DynamicLayer` copies all columns every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, new columns, head_dim] and return all filled columns."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
            return self.keys, self.values
        if self.length > self.keys.shape[2]:
            self.keys, self.values = self._doubled(self.keys, start), self._doubled(self.values, start)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def _doubled(self, states: Tensor, filled: int) -> Tensor:
        num_rows, num_heads, _, head_dim = states.shape
        larger = states.new_empty(num_rows, num_heads, 2 * self.length, head_dim)
        larger[:, :, :filled] = states[:, :, :filled]
        return larger


class GrowingCache(Cache):
    """`GrowingLayer` for each layer of a Transformers model, passed to it as `past_key_values`."""

    def __init__(self, num_layers: int) -> None:
        self.growing_layers = [GrowingLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.growing_layers))

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows [n] int64 of every layer, in this order; a row may be named more than once."""
        for layer in self.growing_layers:
            layer.select_rows(rows)
