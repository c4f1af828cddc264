"""A chunk of a batch with images: which rows of each tensor belong to samples start to end.

Processors lay images out in different ways; what TRL's trainer hands over tells which:

| tensor                        | rows of a sample                                                             |
|-------------------------------|------------------------------------------------------------------------------|
| `pixel_values`                | patches of its images (`image_grid_thw`), its tiles, its images, or one      |
| `image_grid_thw`, `image_position_ids`, `image_sizes` | its images (`num_images`)                            |
| `spatial_shapes`              | its tiles (`num_tiles`)                                                      |
| `pixel_attention_mask`        | its tiles where there are `spatial_shapes`, else one                         |
| `token_type_ids`, `mm_token_type_ids` | one                                                                  |
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

_NEEDS_PIXELS = ("image_grid_thw", "image_position_ids", "spatial_shapes")
_KNOWN = {
    *_NEEDS_PIXELS,
    "pixel_values",
    "image_sizes",
    "pixel_attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
}


def model_inputs(multimodal: dict[str, Any], start: int, end: int, total: int) -> dict[str, Any]:
    """The model's multimodal inputs for samples `start` to `end` of `total`.

    Args:
        multimodal: the keywords of TRL's `_get_per_token_logps_and_entropies`; absent ones are None.

    Raises:
        TypeError: a keyword that none of TRL 1.13 to 1.16 passes.
    """
    given = {name: value for name, value in multimodal.items() if value is not None}
    images, tiles = given.pop("num_images", None), given.pop("num_tiles", None)
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise TypeError(f"{unknown[0]}: unexpected input of a model; expected some of {', '.join(sorted(_KNOWN))}")
    if "pixel_values" not in given:
        given = {name: value for name, value in given.items() if name not in _NEEDS_PIXELS}
    chunk = {}
    for name, tensor in given.items():
        offsets = [0, *accumulate(_rows(name, given, images, tiles) or [1] * total)]
        chunk[name] = tensor[offsets[start] : offsets[end]]
    return chunk


def _rows(name: str, given: dict[str, Any], images: list[int] | None, tiles: list[int] | None) -> list[int] | None:
    """Rows of `given[name]` in each sample; None: one."""
    if name in ("image_grid_thw", "image_position_ids", "image_sizes"):
        return images
    if name == "spatial_shapes" or (name == "pixel_attention_mask" and "spatial_shapes" in given):
        return tiles
    if name != "pixel_values":
        return None
    if "image_grid_thw" in given:
        assert images is not None
        patches = iter(given["image_grid_thw"].prod(-1).tolist())
        return [sum(next(patches) for _ in range(count)) for count in images]
    if "image_position_ids" in given:
        return images
    if tiles is not None:
        return tiles
    return images if images is not None and len(given[name]) == sum(images) else None
