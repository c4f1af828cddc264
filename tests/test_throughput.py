"""What a step's time and utilisation are of."""

from __future__ import annotations

import time

import pytest
import torch

from grpo_fast.trainer import loop, throughput
from grpo_fast.trainer.loop import train
from grpo_fast.trainer.step import Updater
from grpo_fast.trainer.throughput import finish, peak_flops, throughput_metrics
from tests import tiny
from tests.tiny import configured

CUDA = torch.device("cuda")
# As `torch.cuda.get_device_name` gives them; dense bfloat16 with float32 accumulation, TFLOP/s.
NAMES = {
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GH200 144G HBM3e": 989.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H800": 989.5,
    "NVIDIA H800 PCIe": 756.5,
    "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,  # drivers before 470
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 3090": 71,
}
UNKNOWN = (
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA A1000",
    "NVIDIA L400",
    "Tesla V100-SXM2-16GB",
    "AMD Instinct MI300X",
)


@pytest.mark.parametrize(("name", "expected"), [*NAMES.items(), *((name, None) for name in UNKNOWN)])
def test_peaks_are_those_of_the_whole_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(CUDA)
    assert peak == (None if expected is None else pytest.approx(expected * 1e12))


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_utilisation_is_that_of_the_update(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    found = throughput_metrics(
        CUDA, seconds={"update": 2.0, "generate": 6.0}, step_time=8.0, num_tokens=80, flops=121e12
    )
    assert found["mfu"] == pytest.approx(0.5)
    assert found["tokens_per_second"] == 10
    assert found["peak_memory_gib"] == 3


def test_finish_waits_for_the_device_at_hand(monkeypatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    finish(torch.device("cpu"))
    assert not waited
    finish(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


def test_the_optimiser_is_in_the_updates_time(monkeypatch, tmp_path):
    """A device that computes only when it is waited for, as a queue of launches would: AdamW takes 0.3 s then."""
    launched: list[float] = []
    apply = Updater.apply

    def launch(updater: Updater) -> None:
        apply(updater)
        launched.append(0.3)

    def wait(device: torch.device) -> None:
        while launched:
            time.sleep(launched.pop())

    monkeypatch.setattr(Updater, "apply", launch)
    monkeypatch.setattr(loop, "finish", wait)
    config = configured(tmp_path, max_steps=1, eval__eval_on_start=False, eval__eval_on_end=False)
    train(config)
    assert not launched
    (row,) = tiny.rows(tmp_path / "run")
    assert 0.3 <= row["time/update"] <= row["step_time"]
    assert throughput.is_measured("time/update")
