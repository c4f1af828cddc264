"""The trainer: data and rewards in, rollouts, packed updates through `grpo_fast.loss`, metrics and checkpoints out.

Rooms: `config` (what a run is), `data`, `rewards`, `model`, `rollout` (sampling), `batch` and `attention` (packing),
`optim`, `step` (one update), `loop` (the run), `evaluate`, `checkpoint`, `logging`, `plot`. Import what you need from
its room; nothing heavy is imported here.
"""
