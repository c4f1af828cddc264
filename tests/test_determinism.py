"""`full_determinism` is strict from before the first product on a GPU, or refused."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.trainer import attention, loop
from grpo_fast.trainer.attention import PackLayout
from grpo_fast.trainer.determinism import VARIABLE, check_sampling, determinism
from grpo_fast.trainer.errors import ConfigError
from tests.tiny import configured


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)


@pytest.fixture
def config(tmp_path):
    return configured(tmp_path, full_determinism=True, device="auto")


def modes() -> tuple[bool, bool, bool, str]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.fp32_precision,
    )


def set_modes(wanted: tuple[bool, bool, bool, str]) -> None:
    torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision = wanted[2:]


@pytest.mark.parametrize("before", [(True, True, True, "tf32"), (False, False, False, "none")])
def test_strict_inside_and_as_it_was_outside(config, before):
    """Strict: with warn_only, ATen's attention backwards stay atomic and cuDNN's attention may be taken."""
    found = modes()
    try:
        set_modes(before)
        with determinism(config):
            assert modes() == (True, False, False, "ieee")
            assert os.environ[VARIABLE] == ":4096:8"
        assert modes() == before
    finally:
        set_modes(found)


def test_not_asked_for_nothing_changes(config):
    config.full_determinism = False
    before = modes()
    with determinism(config):
        assert modes() == before
    assert VARIABLE not in os.environ


def test_everything_is_set_before_the_model_is_loaded(config, monkeypatch):
    """Loading has the process's first products: packed attention is checked, the head is measured."""

    def load_policy(*arguments, **options):
        assert modes()[:2] == (True, False)
        assert os.environ[VARIABLE] == ":4096:8"
        raise InterruptedError

    monkeypatch.setattr(loop, "load_policy", load_policy)
    with pytest.raises(InterruptedError):
        loop.train(config)


@pytest.mark.parametrize("value", [":4096:8", ":16:8"])
def test_a_repeatable_workspace_may_be_set_already(config, monkeypatch, value):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(VARIABLE, value)
    with determinism(config):
        assert os.environ[VARIABLE] == value


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "before CUDA is first used, which it has been"), (":0:0", "got ':0:0'"), ("", "got ''")],
)
def test_too_late_or_another_workspace_is_refused(config, monkeypatch, tmp_path, value, message):
    """And before anything of an earlier run is removed."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    config.overwrite = True
    earlier = tmp_path / "run" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("{}\n")
    with pytest.raises(ConfigError, match=rf"full_determinism: expected {VARIABLE} to be :4096:8 or :16:8.*{message}"):
        loop.train(config)
    assert earlier.exists()
    assert modes()[1]  # warn_only, as it was
    config.device = "cpu"
    with determinism(config):
        assert modes()[:2] == (True, False)


def test_what_cannot_be_repeated_ends_the_run_with_its_name(config):
    message = r"full_determinism: put_ does not .* deterministic implementation"
    with pytest.raises(ConfigError, match=message), determinism(config):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="out of memory") as other, determinism(config):
        raise RuntimeError("CUDA out of memory")
    assert not isinstance(other.value, ConfigError)
    assert modes()[1]


def test_top_p_is_refused_on_a_gpu(config):
    """transformers cuts at a cumsum of floats, which strict mode refuses on a GPU."""
    check_sampling(config, torch.device("cuda"))
    config.rollout.top_p = 0.9
    check_sampling(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"rollout\.top_p: expected 1 with full_determinism.*got 0\.9"):
        check_sampling(config, torch.device("cuda"))
    config.full_determinism = False
    check_sampling(config, torch.device("cuda"))


def test_flash_attn_is_told(config, monkeypatch):
    told = []

    def flash_attn_varlen_func(q, k, v, *arguments, deterministic, **options):
        told.append(deterministic)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    layout = PackLayout.build([[range(2)]], 2, implementation="flash_attention_2")
    q = torch.zeros(2, 1, 8)
    options = attention._Options(1.0, None, None, 0.0)
    torch.use_deterministic_algorithms(False)
    attention._flash(q, q, q, layout, options)
    with determinism(config):
        attention._flash(q, q, q, layout, options)
    assert told == [False, True]
