"""What runs under compute-sanitizer: small steps of every plan, in vocabularies that no vector length divides.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized triton
"""

from __future__ import annotations

import sys

import torch

from grpo_fast.config import LossConfig
from grpo_fast.loss import grpo_loss

PLANS = ("single_pass", "recompute", "lean", "resident")
VOCABS, TOKENS, WIDTH, SEQUENCES = (97, 5003), 96, 64, 8


def steps(backend: str, device: str = "cuda", workspace: int = 2**28) -> int:
    """Run them; returns how many there were."""
    count = 0
    generator = torch.Generator(device).manual_seed(0)
    cu_seqlens = torch.arange(SEQUENCES + 1, device=device) * (TOKENS // SEQUENCES)
    for vocab in VOCABS:
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.randn(TOKENS, WIDTH, device=device, generator=generator).to(dtype).requires_grad_()
            weight = (torch.randn(vocab, WIDTH, device=device, generator=generator) / 3).to(dtype).requires_grad_()
            targets = torch.randint(0, vocab, (TOKENS,), device=device, generator=generator)
            old, ref = (torch.randn(TOKENS, device=device, generator=generator) - 6 for _ in range(2))
            advantages = torch.randn(SEQUENCES, device=device, generator=generator)
            for plan in PLANS:
                level = "sequence" if plan == "resident" else "token"
                config = LossConfig(beta=0.1, entropy_coef=0.1, importance_sampling_level=level)
                out = grpo_loss(
                    hidden, weight, targets, advantages, cu_seqlens=cu_seqlens, old_logprobs=old, ref_logprobs=ref,
                    config=config, plan=plan, backend=backend, workspace_bytes=workspace,
                )  # fmt: skip
                out.loss.backward()
                assert bool(out.loss.isfinite()), (vocab, dtype, plan)
                count += 1
    return count


if __name__ == "__main__":
    made = steps(sys.argv[1], *sys.argv[2:3])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"sanitized: done, {made} steps")
