"""The fused forward under Triton's interpreter, against logits in float64 by torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.kernels import forward_logprobs as module
from grpo_fast.kernels.forward_launches import INTERPRETED_LAUNCH
from grpo_fast.kernels.forward_logprobs import forward_logprobs, scratch_bytes

POINTERS = replace(INTERPRETED_LAUNCH, descriptors=False)
TOLERANCE = 1e-6
"""Relative RMS error; fp16 products are exact in float32."""
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"bias": True, "logit_scale": -1.3, "softcap": 5.0, "temperature": "rows"},
    "negative scale": {"logit_scale": -0.7, "temperature": 1.3},
}


def make(num_rows: int, width: int, vocab: int, dtype: torch.dtype, **transform: Any) -> tuple[list[Tensor], dict]:
    """(hidden, weight, targets), options, with targets at both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(num_rows * vocab + width)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    targets = torch.randint(vocab, (num_rows,), generator=generator)
    targets[0], targets[-1] = vocab - 1, 0
    if transform.get("bias"):
        transform["bias"] = torch.randn(vocab, generator=generator).to(dtype)
    if transform.get("temperature") == "rows":
        transform["temperature"] = torch.rand(num_rows, generator=generator) + 0.5
    return [hidden, weight, targets], transform


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy, torch.logsumexp(z, -1)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("logprobs", "entropy", "lse"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        error = (a.double() - e).norm() / e.norm()
        assert error <= TOLERANCE, f"{name}: {error:.2e}"  # NaN is not less


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values(transform: str, dtype: torch.dtype) -> None:
    """Ragged V, seven whole tiles and one ragged in two splits; both kinds of loads, to the bit."""
    tensors, options = make(37, 72, 1000, dtype, **TRANSFORMS[transform])
    actual = forward_logprobs(*tensors, **options)
    assert_close(actual, oracle(*tensors, **options))
    for a, b in zip(actual, forward_logprobs(*tensors, **options, launch=POINTERS), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("num_rows", "width", "vocab"),
    [
        pytest.param(5, 33, 1000, id="odd H"),
        pytest.param(3, 16, 32000, id="V=32000"),
        pytest.param(300, 8, 130, id="two groups of row blocks"),
        pytest.param(1, 200, 7, id="V below a tile"),
    ],
)
def test_shapes(num_rows: int, width: int, vocab: int) -> None:
    tensors, _ = make(num_rows, width, vocab, torch.float16)
    launch = replace(INTERPRETED_LAUNCH, block_v=2048) if vocab > 2048 else None
    assert_close(forward_logprobs(*tensors, launch=launch), oracle(*tensors))


@pytest.mark.parametrize("padding", [8, 3])
def test_row_strides(padding: int) -> None:
    (hidden, weight, targets), _ = make(5, 40, 300, torch.float32)
    wide = [torch.full((len(x), 40 + padding), torch.nan).index_copy_(1, torch.arange(40), x) for x in (hidden, weight)]
    assert_close(forward_logprobs(wide[0][:, :40], wide[1][:, :40], targets), oracle(hidden, weight, targets))


def rows_of_logits() -> dict[str, Tensor]:
    """Rows of 300 logits: three tiles, of which the second split has one."""
    z = torch.randn(300, generator=torch.Generator().manual_seed(0))
    columns, infinity = torch.arange(300), torch.inf
    return {
        "some -inf": z.masked_fill(columns % 3 == 1, -infinity),
        "a tile of -inf": z.masked_fill(columns < 128, -infinity),
        "a split of -inf": z.masked_fill(columns >= 256, -infinity),
        "only the target": torch.where(columns == 270, 3.0, -infinity),
        "target -inf": z.masked_fill(columns == 270, -infinity),
        "all -inf": torch.full_like(z, -infinity),
        "NaN": z.masked_fill(columns == 5, torch.nan),
        "NaN target": z.masked_fill(columns == 270, torch.nan),
        "all NaN": torch.full_like(z, torch.nan),
        "+inf": z.masked_fill(columns == 5, infinity),
        "1e4": z + 1e4,
        "-1e4": z - 1e4,
        "+-1e4": torch.where(columns % 2 == 0, 1e4, -1e4) + z,
        "far apart": torch.where(columns == 270, 0.0, -1e4),
        "equal": torch.zeros(300),
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says when it meets an infinity
@pytest.mark.parametrize("name", rows_of_logits())
def test_edge_rows(name: str) -> None:
    z = rows_of_logits()[name]
    tensors = torch.ones(1, 1), z[:, None], torch.tensor([270])
    logprobs, entropy, lse = oracle(*tensors)
    if name == "+inf":
        lse = torch.full_like(lse, torch.nan)
    # A rounding of the largest logit, in base 2, is what float32 can promise.
    tolerance = 1e-6 + 2.0**-22 * z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0
    for actual, expected in zip(forward_logprobs(*tensors), (logprobs, entropy, lse), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=tolerance, equal_nan=True)


def test_a_bias_of_minus_infinity_takes_entries_out() -> None:
    (hidden, weight, targets), _ = make(4, 16, 300, torch.float16)
    bias = torch.zeros(300).masked_fill(torch.arange(300) % 2 == 1, -torch.inf)
    targets = targets // 2 * 2
    expected = oracle(hidden, weight[::2], targets // 2)
    assert_close(forward_logprobs(hidden, weight, targets, bias=bias), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, targets), options = make(40, 72, 300, dtype, bias=True, softcap=3.0, temperature="rows")
    temperature = options.pop("temperature")
    # Multiples of 1/8, whose sums of products are exact: numpy's matrix product, unlike a GPU's, rounds by position.
    hidden, weight = (tensor.mul(8).round().div(8) for tensor in (hidden, weight))

    def run(rows: Tensor, states: Tensor = hidden) -> list[Tensor]:
        return list(forward_logprobs(states[rows], weight, targets[rows], temperature=temperature[rows], **options))

    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    together = run(torch.arange(40))
    assert all(torch.isfinite(result).all() for result in together)
    for rows in (torch.tensor([23]), torch.arange(7, 30), order):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), together, strict=True))

    broken = hidden.index_fill(0, torch.tensor([3]), torch.nan)
    others = torch.arange(40) != 3
    for a, b in zip(run(torch.arange(40), broken), together, strict=True):
        assert torch.equal(a[others], b[others])
        assert a[3].isnan()

    monkeypatch.setattr(module, "ROWS_PER_LAUNCH", 16)
    assert all(torch.equal(a, b) for a, b in zip(run(torch.arange(40)), together, strict=True))
    assert scratch_bytes(40, 300, dtype, hidden.device) == 16 * 2 * 16


@pytest.mark.parametrize("launch", [None, POINTERS])
def test_targets_outside_the_vocabulary_have_no_logprob(launch: Any) -> None:
    (hidden, weight, targets), _ = make(5, 16, 300, torch.float32)
    sound = forward_logprobs(hidden, weight, targets, launch=launch)
    wrong = targets.clone()
    wrong[1:] = torch.tensor([-1, 300, -(2**32), 2**32 + 3])
    logprobs, entropy, lse = forward_logprobs(hidden, weight, wrong, launch=launch)
    assert logprobs.isnan().tolist() == [False, True, True, True, True]
    assert torch.equal(logprobs[0], sound[0][0])
    assert torch.equal(entropy, sound[1])
    assert torch.equal(lse, sound[2])


def test_no_rows() -> None:
    (hidden, weight, targets), _ = make(2, 16, 300, torch.float32)
    assert [result.shape for result in forward_logprobs(hidden[:0], weight, targets[:0])] == [(0,)] * 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", lambda a: a | {"hidden": a["hidden"].bfloat16(), "weight": a["weight"].bfloat16()}),
        ("hidden", lambda a: a | {"hidden": a["hidden"].double()}),
        ("hidden", lambda a: a | {"hidden": a["hidden"].T.contiguous().T}),
        ("weight", lambda a: a | {"weight": a["weight"][:, :8]}),
        ("weight", lambda a: a | {"weight": a["weight"].half()}),
        ("weight", lambda a: a | {"weight": a["weight"][:0]}),
        ("targets", lambda a: a | {"targets": a["targets"].int()}),
        ("targets", lambda a: a | {"targets": a["targets"][:1]}),
        ("bias", lambda a: a | {"bias": torch.zeros(299)}),
        ("temperature", lambda a: a | {"temperature": torch.ones(2, dtype=torch.float64)}),
    ],
)
def test_bad_input(name: str, change: Any) -> None:
    (hidden, weight, targets), _ = make(2, 16, 300, torch.float32)
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        forward_logprobs(**change({"hidden": hidden, "weight": weight, "targets": targets}))
