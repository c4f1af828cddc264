"""What the sampler's supports look like and what they spare: numbers of a step, from sizes that lie on the host.

Legend: T tokens, V vocabulary, N token ids of the supports.
"""

from __future__ import annotations

from torch import Tensor

from grpo_fast.packing import Support


def support_sizes(support: Support, vocab: int) -> Tensor:
    """`[T]` words of each row; V where nothing was cut."""
    sizes = support.sizes
    return sizes.masked_fill(sizes == 0, vocab)


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
        support/mean, support/median, support/max: words of a token's support, V where nothing was cut (of an even
            number of tokens the lower median).
        support/singleton_fraction: share of tokens that could be nothing else; the head does nothing for them.
        support/sparse_fraction: share whose rows go through gathered rows of the weight.
    """
    return {
        "support/mean": float(sizes.double().mean()),
        "support/median": float(sizes.median()),
        "support/max": float(sizes.max()),
        "support/singleton_fraction": float((sizes == 1).double().mean()),
        "support/sparse_fraction": float(((sizes > 1) & (sizes <= limit)).double().mean()),
    }
