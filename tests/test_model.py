"""Where a model is looked for, and how long that may take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from grpo_fast.trainer import model as model_module
from grpo_fast.trainer.config import ModelConfig
from grpo_fast.trainer.errors import ModelError
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def hub(monkeypatch):
    """A hub that does what `answer` says (an error, or None for a model) and counts the questions."""

    class Hub:
        answer: Exception | None = None
        questions = 0

        def metadata(self, url: str, **options: Any) -> None:
            self.questions += 1
            assert url.endswith("nomodel/resolve/main/config.json")
            assert not options.get("retry_on_errors")
            if self.answer is not None:
                raise self.answer

    found = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", found.metadata)
    return found


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, bool]]:
    """What transformers was asked to load, and whether from this machine alone; it says no."""
    import transformers

    asked: list[tuple[str, bool]] = []

    def from_pretrained(path: str, *, local_files_only: bool, **options: Any) -> None:
        asked.append((path, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    return asked


def load(path: str) -> str:
    """The error of loading it."""
    with pytest.raises(ModelError) as error:
        model_module.load_policy(ModelConfig(path=path), CPU)
    return str(error.value)


def test_an_unreachable_hub_is_asked_once(hub, loaded):
    hub.answer = ConnectionError("Name or service not known")
    started = time.perf_counter()
    message = load("nomodel")
    assert time.perf_counter() - started < 5
    assert hub.questions == 1
    assert not loaded
    assert message.startswith("model.path: cannot load nomodel: there is no folder of that name in ")
    assert str(Path.cwd()) in message
    assert f"no such model in the cache {constants.HF_HUB_CACHE}" in message
    assert message.endswith("cannot be reached (Name or service not known)")


def test_offline_the_hub_is_not_asked(hub, loaded, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("nomodel").endswith("and HF_HUB_OFFLINE is set")
    assert hub.questions == 0
    assert not loaded


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_what_is_in_the_cache_does(hub, loaded, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    hub.answer = TimeoutError()
    assert load("nomodel") == "model.path: cannot load nomodel: not here"
    assert loaded == [("nomodel", True)]


def test_what_the_hub_has_is_loaded_from_it(hub, loaded):
    load("nomodel")
    assert hub.questions == 1
    assert loaded == [("nomodel", False)]


def test_what_the_hub_has_not_is_its_answer(hub, loaded):
    class NotFoundError(HfHubHTTPError):
        def __init__(self) -> None:  # its own wants a response of the HTTP library
            pass

        def __str__(self) -> str:
            return "\n404 Client Error.\n\nRepository Not Found"

    hub.answer = NotFoundError()
    expected = "model.path: there is no folder nomodel here, and the hub answers: 404 Client Error."
    assert load("nomodel") == expected
    assert not loaded


def test_a_folder_comes_first(hub, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "nomodel")
    load("nomodel")
    assert hub.questions == 0
    assert loaded == [("nomodel", True)]
