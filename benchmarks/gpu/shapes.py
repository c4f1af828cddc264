"""The sizes that the parts run at: those of a real step, and tiny ones that only show that the code runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import MODELS, Model

GIB = 2**30


@dataclass(frozen=True)
class Shapes:
    """Sizes.

    Attributes:
        heads: by their role: the targets are stated for H = 4096, 2048 and 1024.
        tokens: T of a step. workspaces: bytes, by the name that the tables show; the targets hold at the first.
        tuning_workspaces, tile_rows: what the second stream and the tiles are tried with.
        vocabs: of the row kernels. kernel_rows: rows that one timed action goes through, tile by tile.
        rounds, warm_ups: timed and untimed runs of each contender.
    """

    tiny: bool
    heads: tuple[Model, ...]
    tokens: int
    workspaces: dict[str, int]
    tuning_workspaces: dict[str, int]
    tile_rows: tuple[int, ...]
    vocabs: tuple[int, ...]
    kernel_rows: int
    rounds: int
    warm_ups: int
    models: tuple[Model, ...]
    sequences: int = 32
    demo_steps: int = 8
    run_shape: tuple[int, int, int] = (4096, 1024, 151936)


FULL = Shapes(
    tiny=False,
    heads=(
        MODELS["Qwen3-8B"],
        Model("Qwen3-1.7B", 2048, 151936),
        MODELS["Qwen3-0.6B"],
        MODELS["Llama-3.1-8B"],
    ),
    tokens=16384,
    workspaces={"2.5 GiB": int(2.5 * GIB), "1 GiB": GIB, "0.25 GiB": GIB // 4},
    tuning_workspaces={"2.5 GiB": int(2.5 * GIB), "1 GiB": GIB, "6 GiB": 6 * GIB},
    tile_rows=(512, 1024),
    vocabs=(151936, 128256, 50257, 256000),
    kernel_rows=4096,
    rounds=7,
    warm_ups=2,
    models=(
        MODELS["Qwen3-8B"],
        MODELS["Qwen3-0.6B"],
        MODELS["Llama-3.1-8B"],
        MODELS["Gemma-2-2B"],
        MODELS["Qwen3-4B"],
        MODELS["SmolLM2-135M"],
    ),
)

# A vocabulary that no vector length divides. Rows of 8 and 16 instead of 512 and 1024, workspaces of some such tiles.
TINY = Shapes(
    tiny=True,
    heads=(Model("tiny-4096", 32, 203), Model("tiny-1024", 16, 203)),
    tokens=48,
    workspaces={"2.5 GiB": 160 * 2**10, "1 GiB": 80 * 2**10, "0.25 GiB": 30 * 2**10},
    tuning_workspaces={"2.5 GiB": 60 * 2**10, "1 GiB": 30 * 2**10, "6 GiB": 160 * 2**10},
    tile_rows=(16, 32),
    vocabs=(97,),
    kernel_rows=32,
    rounds=2,
    warm_ups=0,
    models=(Model("tiny", 16, 203),),
    sequences=8,
    demo_steps=2,
    run_shape=(40, 16, 97),
)
