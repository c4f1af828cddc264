"""tests/traffic.py: the bytes that interpreted kernels move, counted by tensor."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.traffic import ELSEWHERE, Traffic, count_traffic


@triton.jit
def _two_sweeps_kernel(logits, lse, dx, V, stride, BLOCK: tl.constexpr):
    # One row a program: its sum of exponentials, then its probabilities, read a second time.
    row = logits + tl.program_id(0).to(tl.int64) * stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(row + columns, mask=columns < V, other=float("-inf")))
    log_sum = tl.log(tl.sum(total, 0))
    tl.store(lse + tl.program_id(0), log_sum)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        tl.store(dx + tl.program_id(0) * V + columns, tl.exp(z - log_sum).to(tl.float16), mask=columns < V)


@triton.jit
def _copy_block_kernel(source, out, N, BLOCK: tl.constexpr):
    tile = tl.make_block_ptr(source, (N,), (1,), (0,), (BLOCK,), (0,))
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(tile, boundary_check=(0,), padding_option="zero"), mask=columns < N)


@pytest.mark.parametrize("V", [64, 100])
def test_a_row_read_twice_and_written_once(V: int) -> None:
    R, stride = 3, 128
    logits = torch.randn(R, stride)[:, :V]
    lse, dx = torch.empty(R), torch.empty(R, V, dtype=torch.float16)
    with count_traffic({"logits": logits, "dx": dx, "lse": lse}) as traffic:
        _two_sweeps_kernel[(R,)](logits, lse, dx, V, stride, BLOCK=32)
    # The kernel ran as usual, and masked lanes cost nothing.
    torch.testing.assert_close(dx.float(), logits.softmax(-1), atol=1e-3, rtol=1e-3)
    assert traffic["logits"].per(R * V) == {"loads": 8, "stores": 0}
    assert traffic["dx"].per(R * V) == {"loads": 0, "stores": 2}
    assert traffic["lse"] == Traffic(loads=0, stores=4 * R)
    assert traffic[ELSEWHERE] == Traffic()


def test_memory_of_no_named_tensor_is_not_lost() -> None:
    logits, lse, dx = torch.randn(2, 32), torch.empty(2), torch.empty(2, 32, dtype=torch.float16)
    with count_traffic({"dx": dx}) as traffic:
        _two_sweeps_kernel[(2,)](logits, lse, dx, 32, 32, BLOCK=32)
    assert traffic[ELSEWHERE] == Traffic(loads=2 * 2 * 32 * 4, stores=2 * 4)


def test_block_pointers_are_counted() -> None:
    source, out = torch.randn(20), torch.empty(20)
    with count_traffic({"source": source, "out": out}) as traffic:
        _copy_block_kernel[(1,)](source, out, 20, BLOCK=32)
    assert torch.equal(source, out)
    assert (traffic["source"], traffic["out"]) == (Traffic(loads=80), Traffic(stores=80))


def test_nothing_is_counted_afterwards() -> None:
    source, out = torch.randn(20), torch.empty(20)
    with count_traffic({"source": source}) as traffic:
        pass
    _copy_block_kernel[(1,)](source, out, 20, BLOCK=32)
    assert traffic["source"] == Traffic()


def test_tensors_that_share_memory_are_refused() -> None:
    logits = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="overlap"), count_traffic({"logits": logits, "dx": logits[1:]}):
        pass
