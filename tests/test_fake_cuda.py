"""Runs tests/fake_cuda in a process with two made-up CUDA devices: what makes them up is loaded before torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def test_on_made_up_cards(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA devices of its own to be asked about")
    home = Path(torch.__file__).parent
    library = tmp_path / "cards.so"
    paths = [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
    source = str(HERE / "fake_cuda" / "cards.cpp")
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", source, *paths, "-lc10", "-ltorch_cpu", "-o", str(library)],
        check=True,
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "GRPO_FAST_FAKE_CARDS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "fake_cuda")],
        cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
