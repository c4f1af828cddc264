"""Which rows of a batch with images belong to a chunk of its samples, for each layout that TRL hands over."""

from __future__ import annotations

import pytest
import torch

from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))

PIXELS = torch.arange(12).reshape(12, 1)
TYPES = torch.arange(6).reshape(3, 2)
GRID = torch.tensor([[1, 2, 2], [1, 1, 2], [1, 2, 3]])  # 4, 2 and 6 patches
# three samples with 2, 0 and 1 images; the first chunk is samples 0 and 1
LAYOUTS = {
    "patches": ({"pixel_values": PIXELS, "image_grid_thw": GRID, "num_images": [2, 0, 1]}, 6, {"image_grid_thw": 2}),
    "positions": (
        {"pixel_values": PIXELS[:3], "image_position_ids": GRID, "num_images": [2, 0, 1]},
        2,
        {"image_position_ids": 2},
    ),
    "shaped tiles": (
        {
            "pixel_values": PIXELS[:5],
            "pixel_attention_mask": PIXELS[:5],
            "spatial_shapes": PIXELS[:5],
            "num_images": [2, 0, 1],
            "num_tiles": [3, 0, 2],
        },
        3,
        {"pixel_attention_mask": 3, "spatial_shapes": 3},
    ),
    "tiles": ({"pixel_values": PIXELS[:5], "num_images": [2, 0, 1], "num_tiles": [3, 0, 2]}, 3, {}),
    "images": (
        {"pixel_values": PIXELS[:4], "image_sizes": PIXELS[:4], "num_images": [2, 1, 1]},
        3,
        {"image_sizes": 3},
    ),
    "samples": (
        {"pixel_values": PIXELS[:3], "pixel_attention_mask": PIXELS[:3], "mm_token_type_ids": TYPES},
        2,
        {"pixel_attention_mask": 2, "mm_token_type_ids": 2},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_of_images(name: str) -> None:
    from grpo_fast.integrations.trl.inputs import model_inputs

    given, rows, others = LAYOUTS[name]
    given = {**given, "token_type_ids": None}
    first, rest = model_inputs(given, 0, 2, 3), model_inputs(given, 2, 3, 3)
    assert {key: len(values) for key, values in first.items()} == {"pixel_values": rows, **others}
    for key in first:  # nothing lost, nothing twice
        assert torch.equal(torch.cat([first[key], rest[key]]), given[key])


def test_chunks_without_images() -> None:
    from grpo_fast.integrations.trl.inputs import model_inputs

    assert model_inputs({"image_grid_thw": GRID, "pixel_values": None, "num_images": [2, 0, 1]}, 0, 3, 3) == {}
    with pytest.raises(TypeError, match="audio_values: unexpected"):
        model_inputs({"audio_values": PIXELS}, 0, 3, 3)
