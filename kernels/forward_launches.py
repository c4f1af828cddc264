"""Launch table of `forward_logprobs`: tiles, warps and stages by architecture and operands."""

from __future__ import annotations

from dataclasses import dataclass, replace

GROUP_BLOCKS = 16
"""Row blocks that go through the vocabulary together: a power of two near the square root of the multiprocessors, where
hidden states and weight tiles in use at once are as many bytes, and fewest."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Compile-time choices of the main kernel; `descriptors`: TMA loads; `origin`: where the numbers come from."""

    block_t: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    origin: str = "occupancy arithmetic and the compiler's register counts, not measured"

    def constexprs(self, *, softcap: bool, negate: bool, unit: int, even_k: bool) -> dict[str, object]:
        """All constexprs of the kernel but absent tensors."""
        tile = {"BLOCK_T": self.block_t, "BLOCK_V": self.block_v, "BLOCK_K": self.block_k, "GROUP_BLOCKS": GROUP_BLOCKS}
        access = {"DESCRIPTORS": self.descriptors, "UNIT": unit, "EVEN_K": even_k}
        return {**tile, **access, "SOFTCAP": softcap, "NEGATE": negate}


# By architecture, for bf16 and fp16 operands aligned to 16 bytes; one block a multiprocessor everywhere. On Hopper the
# accumulators of 128 x 256 are half of the registers, and smaller tiles would ask for more than L2 delivers (48 bytes a
# clock and multiprocessor at the full rate with these, 64 with 128 x 128). Ampere's stages fit in the 99 KiB of its
# consumer chips. Blackwell keeps two accumulators in tensor memory and starts the next tile before the epilogue.
LAUNCHES = {
    80: Launch(block_t=128, block_v=128, block_k=64, num_warps=8, num_stages=3),
    90: Launch(block_t=128, block_v=256, block_k=64, num_warps=8, num_stages=4, descriptors=True),
    100: Launch(block_t=128, block_v=128, block_k=64, num_warps=8, num_stages=4, descriptors=True),
}
# Where a bias would make the compiler spill registers.
BIAS_LAUNCHES = {100: replace(LAUNCHES[100], block_v=64)}
# float32, which has no tensor cores without rounding, and operands that are not aligned.
SMALL_LAUNCH = Launch(block_t=64, block_v=128, block_k=16, num_warps=8, num_stages=3)
INTERPRETED_LAUNCH = Launch(block_t=16, block_v=128, block_k=64, num_warps=4, num_stages=1, descriptors=True)


def default_launch(architecture: int, itemsize: int, *, aligned: bool, bias: bool) -> Launch:
    """The launch for an architecture (major * 10; 0: the interpreter) and operands of `itemsize` bytes."""
    if architecture == 0:
        return INTERPRETED_LAUNCH
    if itemsize > 2 or not aligned:
        return SMALL_LAUNCH
    # Consumer Blackwell (120) has neither Hopper's nor Blackwell's matrix instructions, and Ampere's shared memory.
    known = architecture if architecture in LAUNCHES else 80
    return BIAS_LAUNCHES.get(known, LAUNCHES[known]) if bias else LAUNCHES[known]
