"""docs/losses.md from the table of losses: `python -m grpo_fast.loss_page > docs/losses.md`."""

from __future__ import annotations

import math

from grpo_fast.losses import CLIP_METRICS, IMPORTANCE_SAMPLING_MODES, LOSSES, Aggregation, Coupling, Loss, Parameter

_AGGREGATIONS: dict[Aggregation, str] = {
    "token_mean": "m / max(sum of m, 1): the mean over tokens",
    "sequence_mean": "m / (max(L_s, 1) S): the mean over sequences of the mean over tokens",
    "sequence_sum": "m / S: the mean over sequences of the sum over tokens",
    "constant_length": "m / (S max_completion_length)",
}
_COUPLINGS: dict[Coupling, str] = {
    "nothing": "none: each token by itself",
    "sequence": "the tokens of a sequence",
    "clamped_sequence": "the tokens of a sequence, through clamped ratios",
}


def documentation() -> str:
    """The page, as text; losses that are registered by now are in it."""
    return "\n".join([_HEAD, *map(_section, LOSSES.values())])


_HEAD = """# Losses

What `LossConfig(loss_type=...)` takes; generated from `grpo_fast/losses.py` by `python -m grpo_fast.loss_page`.

p log-probability of the current policy, r = p - old, w the ratio at the configured level, A advantage, m mask, L_s
unmasked tokens of sequence s, S sequences, mu log-probability of the policy that sampled, sg stop-gradient. The loss is
the sum of weight times term, plus beta times the KL, minus the entropy bonus; masks and the train/inference correction
multiply the term. To add one of your own: [adding-a-loss.md](adding-a-loss.md).
"""


def _section(loss: Loss) -> str:
    metrics = [*CLIP_METRICS[loss.clip], *(f"{name} (mean over {over})" for name, over in loss.metrics.items())]
    lines = {
        "Term": f"`{loss.formula}`",
        "Weight": _AGGREGATIONS[loss.aggregation],
        "Couples": _COUPLINGS[loss.couples],
        "Reads": ", ".join(loss.reads),
        "Needs": ", ".join(loss.requires),
        "Corrections": ", ".join(loss.importance_sampling_modes) or "none",
        "Metrics": ", ".join(metrics),
        "Kernel": loss.kernel or "none: torch between the row kernels",
        "Paper": loss.paper,
    }
    if loss.importance_sampling_modes == IMPORTANCE_SAMPLING_MODES:
        del lines["Corrections"]
    table = [f"- {name}: {text}" for name, text in lines.items() if text]
    if loss.parameters:
        table += ["", "| parameter | default | range | |", "|---|---|---|---|"]
        table += [f"| {p.name} | {p.default:g} | {_range(p)} | {p.doc} |" for p in loss.parameters]
    return "\n".join([f"## {loss.name}", "", f"{loss.when[0].upper()}{loss.when[1:]}.", "", *table, ""])


def _range(p: Parameter) -> str:
    bounds = [f"> {p.above:g}"] * (p.above > -math.inf) + [f">= {p.at_least:g}"] * (p.at_least > -math.inf)
    return ", ".join([*bounds, *[f"<= {p.at_most:g}"] * (p.at_most < math.inf)]) or "any"


if __name__ == "__main__":
    print(documentation(), end="")
