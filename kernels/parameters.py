"""The numbers that a token objective is given, one list for all devices: Python hands them over in this order.

`python kernels/parameters.py` writes csrc/parameters.h from it; Triton's kernels find a number's place by its name.
"""

from __future__ import annotations

from pathlib import Path

PARAMETERS = (
    "clip_low",  # 1 - epsilon, taken in double
    "clip_high",  # 1 + epsilon_high, likewise
    "clip_bound",  # epsilon_high itself
    "delta",  # infinite where there is no bound, as are importance_min and importance_max
    "beta",
    "importance_min",
    "importance_max",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "dppo_threshold",
    "dppo_log_ratio_coef",
    "dual_clip",
)

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "parameters.h"


def header() -> str:
    """The text of csrc/parameters.h."""
    listed = "".join(f" \\\n  X({name})" for name in PARAMETERS)
    return (
        "// The numbers of an objective, X(name) each, in the order in which Python hands them over. Written by\n"
        "// `python kernels/parameters.py`, which says what they are.\n"
        f"#pragma once\n\n#define GRPO_FAST_PARAMETERS(X){listed}\n"
    )


if __name__ == "__main__":
    HEADER.write_text(header())
