"""Buckets of weights: in order, of a bounded size, and readable as SGLang reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from megatron_gspo.rollout.weight_sync_buckets import Bucket, pack


def read_back(bucket: Bucket) -> dict[str, torch.Tensor]:
    """The tensors, by what a server is told: laid end to end, each viewed in its dtype (SGLang's tensor_bucket.py)."""
    found, start = {}, 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        end = start + math.prod(shape) * dtype.itemsize
        found[name] = bucket.data[start:end].view(dtype).reshape(shape)
        start = end
    assert start == len(bucket.data)
    return found


def given_away(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies that nobody else holds, as an exporter's are of what it gathered."""
    for name, tensor in tensors.items():
        yield name, tensor.clone()


@pytest.mark.parametrize("bucket_bytes", [1, 40, 64, 10**6])
def test_what_is_packed_is_read_back_whatever_the_buckets_size(bucket_bytes: int):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "after an odd number of bfloat16": torch.randn(5),
        "transposed": torch.randn(4, 3).T,
        "scalar": torch.tensor(2.0),
        "last": torch.randn(2, 2, 2),
    }
    buckets = list(pack(given_away(tensors), bucket_bytes))
    found = {name: tensor for bucket in buckets for name, tensor in read_back(bucket).items()}
    assert list(found) == list(tensors)
    views = {name: tensor for bucket in buckets for name, tensor in bucket.tensors().items()}
    assert all(torch.equal(views[name], tensor) for name, tensor in found.items())
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert all(len(bucket.data) <= bucket_bytes or len(bucket.names) == 1 for bucket in buckets)


def test_a_bucket_is_full_before_the_next_one_begins():
    buckets = list(pack(((str(number), torch.zeros(4)) for number in range(5)), bucket_bytes=32))
    assert [bucket.names for bucket in buckets] == [("0", "1"), ("2", "3"), ("4",)]


def test_the_next_version_takes_the_memory_of_the_last():
    def version(value: float) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((str(number), torch.full((4,), value)) for number in range(4))

    first = list(pack(version(1.0), bucket_bytes=32))
    addresses = {bucket.data.data_ptr() for bucket in first}
    second = list(pack(version(2.0), 32, [bucket.data for bucket in first]))
    assert {bucket.data.data_ptr() for bucket in second} == addresses
    assert all((tensor == 2.0).all() for bucket in second for tensor in read_back(bucket).values())
