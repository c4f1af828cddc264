"""Checkpoints are whole or absent, and give back every bit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from grpo_fast.trainer.checkpoint import (
    Checkpoint,
    RngState,
    checkpoint_path,
    checkpoints,
    find_checkpoint,
    later_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from grpo_fast.trainer.errors import CheckpointError
from grpo_fast.trainer.files import recover
from tests.kills import killed_everywhere


def make(step: int, *, with_experience: bool = False) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        trainer={
            "weight/a": torch.randn(3, 4, generator=generator),
            "exp_avg/a": torch.randn(3, 4, generator=generator),
            "step/a": torch.tensor(float(step)),
        },
        experience={"tokens": torch.arange(step)} if with_experience else None,
        rng=RngState.take(),
        state={"counters": {"step": step}, "config": {"seed": 1}},
    )


@pytest.mark.parametrize("with_experience", [False, True])
def test_what_is_saved_is_loaded(tmp_path, with_experience):
    saved = make(12, with_experience=with_experience)
    path = save_checkpoint(tmp_path, saved)
    assert path == checkpoint_path(tmp_path, 12)
    loaded = load_checkpoint(path)
    assert loaded.step == 12
    assert loaded.state["counters"] == {"step": 12}
    assert loaded.trainer.keys() == saved.trainer.keys()
    for name, tensor in saved.trainer.items():
        assert torch.equal(loaded.trainer[name], tensor)
    if with_experience:
        assert torch.equal(loaded.experience["tokens"], torch.arange(12))
    else:
        assert loaded.experience is None
    weights, config = load_weights(path)
    assert list(weights) == ["a"]
    assert torch.equal(weights["a"], saved.trainer["weight/a"])
    assert config == {"seed": 1}


def test_generators_continue(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    random.gauss(0, 1)  # leaves half a pair behind in Python's generator, and in numpy's
    np.random.randn()
    path = save_checkpoint(tmp_path, make(1))
    expected = draw()
    draw()
    load_checkpoint(path).rng.restore()
    assert draw() == expected


def test_generators_of_many_cards_go_back_in_their_order(tmp_path, monkeypatch):
    """By name, cuda/10 comes before cuda/2."""
    states = [torch.full((16,), number, dtype=torch.uint8) for number in range(12)]
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    load_checkpoint(save_checkpoint(tmp_path, make(1))).rng.restore()
    assert [int(state[0]) for state in restored] == list(range(12))
    restored.clear()
    states.pop()
    load_checkpoint(checkpoint_path(tmp_path, 1)).rng.restore()
    assert not restored  # of another machine


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000006", "checkpoint-000008"]
    save_checkpoint(tmp_path, make(10), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000010"]
    save_checkpoint(tmp_path, make(12))
    assert later_checkpoints(tmp_path, 10) == [checkpoint_path(tmp_path, 12)]
    assert later_checkpoints(tmp_path, 12) == []


@pytest.mark.parametrize("step", [2, 4])
def test_a_death_while_saving_leaves_the_last_one(tmp_path, step):
    """Whichever operation of the file system is the last; also where one of the same step is there already."""

    def save(folder):
        save_checkpoint(folder, make(step), keep=1)

    for folder in killed_everywhere(tmp_path, lambda folder: save_checkpoint(folder, make(2)), save):
        recover(folder, ["checkpoint-*"])
        found = checkpoints(folder)
        assert sorted(folder.iterdir()) == found
        assert found
        assert all(load_checkpoint(path).step in (2, step) for path in found)
        save(folder)
        assert load_checkpoint(find_checkpoint("auto", folder)).step == step


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, make(2, with_experience=True))
    save_checkpoint(tmp_path, make(2))
    assert load_checkpoint(checkpoint_path(tmp_path, 2)).experience is None
    assert len(list(tmp_path.iterdir())) == 1


def test_finding(tmp_path):
    assert find_checkpoint("auto", tmp_path / "nothing") is None
    newest = [save_checkpoint(tmp_path, make(step)) for step in (2, 10)][-1]
    assert find_checkpoint("auto", tmp_path) == newest
    assert find_checkpoint(str(tmp_path), tmp_path / "elsewhere") == newest
    assert find_checkpoint(str(checkpoint_path(tmp_path, 2)), tmp_path) == checkpoint_path(tmp_path, 2)
    with pytest.raises(CheckpointError, match="expected auto, a checkpoint or a run"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


def test_broken_checkpoints_say_so(tmp_path):
    path = save_checkpoint(tmp_path, make(2))
    (path / "trainer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    save_checkpoint(tmp_path, make(3))
    (path / "trainer.safetensors").write_bytes((checkpoint_path(tmp_path, 3) / "trainer.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"expected checkpoint format 1; .* has 99"):
        load_checkpoint(path)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        load_checkpoint(path)
    assert find_checkpoint("auto", tmp_path) == checkpoint_path(tmp_path, 3)
