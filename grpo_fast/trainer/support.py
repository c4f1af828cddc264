"""What the sampler's supports look like and what they spare: numbers of a step, from sizes that lie on the host.

Legend: T tokens, V vocabulary, N token ids of the supports.
"""

from __future__ import annotations

from torch import Tensor

from grpo_fast.packing import size_metrics


def words_multiplied(sizes: Tensor, vocab: int, limit: int) -> int:
    """Dot products of the head for rows of these `sizes` `[T]`: none for one word, all V above `limit`, where products
    are dense whatever was cut.

    Args:
        limit: words of the largest support that is computed on gathered rows (`grpo_fast.loss.sparse_limit`).
    """
    multiplied = sizes.masked_fill(sizes > limit, vocab)
    return int(multiplied.masked_fill(sizes == 1, 0).sum())


def support_metrics(sizes: Tensor, limit: int) -> dict[str, float]:
    """Of the tokens of a step, those that no pack holds (of zero advantage) included.

    Args:
        sizes: `[T]`, T > 0. limit: as in `words_multiplied`.

    Returns:
        those of `packing.size_metrics`; the head does nothing for singletons.
        support/sparse_fraction: share whose rows go through gathered rows of the weight.
    """
    sparse = (sizes > 1) & (sizes <= limit)
    return size_metrics(sizes) | {"support/sparse_fraction": float(sparse.double().mean())}
