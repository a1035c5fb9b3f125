"""Everything that is counted about importance ratios and routing change together, for tokens and for responses.

In: change rates and log-ratios of a micro-batch's response tokens. Out: additive sums, and the metrics of
`ratio_coupling` and `ratio_decomposition` for both units: w_{i,t} (eq. 3) and the length-normalised s_i (eq. 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_gspo.routing.ratio_coupling import (
    RatioCoupling,
    couple_change_to_ratio,
    coupling_metrics,
    response_means,
)
from megatron_gspo.routing.ratio_decomposition import RatioDecomposition, decompose_ratio, decomposition_metrics


@dataclass(frozen=True, eq=False)
class RatioStatistics:
    """Sums over tokens, and over responses."""

    token_coupling: RatioCoupling
    sequence_coupling: RatioCoupling
    token_decomposition: RatioDecomposition
    sequence_decomposition: RatioDecomposition

    @classmethod
    def of(
        cls, change_rate: torch.Tensor, natural: torch.Tensor, replayed: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> RatioStatistics:
        """Count a micro-batch.

        Args:
            change_rate: [T] float, mean of c over all MoE layers.
            natural, replayed: [T] float, log w with natural routing and with the old policy's routes replayed.
            cu_seqlens: [N + 1] int; response i owns tokens cu_seqlens[i]:cu_seqlens[i + 1].
        """
        sequence_rate, sequence_natural, sequence_replayed = (
            response_means(values, cu_seqlens) for values in (change_rate, natural, replayed)
        )
        return cls(
            token_coupling=couple_change_to_ratio(natural, change_rate),
            sequence_coupling=couple_change_to_ratio(sequence_natural, sequence_rate),
            token_decomposition=decompose_ratio(natural, replayed),
            sequence_decomposition=decompose_ratio(sequence_natural, sequence_replayed),
        )

    def __add__(self, other: RatioStatistics) -> RatioStatistics:
        """The statistics of both sets of responses."""
        return RatioStatistics(
            self.token_coupling + other.token_coupling,
            self.sequence_coupling + other.sequence_coupling,
            self.token_decomposition + other.token_decomposition,
            self.sequence_decomposition + other.sequence_decomposition,
        )

    def to_vector(self) -> torch.Tensor:
        """All sums, [length] float64."""
        return torch.cat([part.to_vector() for part in self._parts()])

    def from_vector(self, vector: torch.Tensor) -> RatioStatistics:
        """What `vector`, as `to_vector` lays it out, says."""
        tokens, sequences, token_parts, sequence_parts = vector.split([len(part.to_vector()) for part in self._parts()])
        return RatioStatistics(
            self.token_coupling.from_vector(tokens),
            self.sequence_coupling.from_vector(sequences),
            self.token_decomposition.from_vector(token_parts),
            self.sequence_decomposition.from_vector(sequence_parts),
        )

    def metrics(self) -> dict[str, float]:
        """By the names that `ratio_coupling` and `ratio_decomposition` document, for `token` and `sequence`."""
        return (
            coupling_metrics(self.token_coupling, "token")
            | coupling_metrics(self.sequence_coupling, "sequence")
            | decomposition_metrics(self.token_decomposition, "token")
            | decomposition_metrics(self.sequence_decomposition, "sequence")
        )

    def _parts(self) -> tuple[RatioCoupling, RatioCoupling, RatioDecomposition, RatioDecomposition]:
        return self.token_coupling, self.sequence_coupling, self.token_decomposition, self.sequence_decomposition
