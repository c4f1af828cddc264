"""The benchmark suite: contenders agree with float64 or are caught, FLOPs and bytes, rounds, memory, report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import measure, report
from benchmarks.baselines import CONTENDERS, FEW, Contender, Outcome, implementations
from benchmarks.cases import (
    MODELS,
    SCENARIOS,
    Batch,
    Case,
    Model,
    growth_cases,
    is_quick,
    loss_cases,
    make_batch,
)
from benchmarks.machine import PeakMemory
from benchmarks.measure import Entry, Measurement
from benchmarks.oracle import FLOORS, SampledRows, check_small, small_case, small_errors
from benchmarks.supports import mask_of
from grpo_fast.loss import LossConfig

TINY = Case(Model("tiny", 32, 500), 64, SCENARIOS["full"], sequences=8)
MIB = 2**20


# -- contenders -------------------------------------------------------------------------------------------------------


SCENARIOS_AND_CAPS = [pytest.param(scenario, None, id=scenario.name) for scenario in SCENARIOS.values()]
SCENARIOS_AND_CAPS += [pytest.param(SCENARIOS[name], 30.0, id=f"{name}-softcap") for name in ("full", "no_grad")]


@pytest.mark.parametrize(("scenario", "softcap"), SCENARIOS_AND_CAPS)
@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=lambda c: c.name)
def test_contenders_agree_with_the_oracle(contender: Contender, scenario: Any, softcap: float | None) -> None:
    reason = contender.why_not_offered(small_case(scenario, softcap), "cpu") or contender.why_missing()
    if reason:
        pytest.skip(reason)
    errors, complaint = check_small(contender, scenario, softcap, "cpu")
    assert complaint is None
    expected = {"loss", "grad_hidden"} if scenario.gradient else {"logprobs", "entropy"}
    expected |= {"grad_weight"} if scenario.gradient and scenario.trains_head else set()
    assert expected <= set(errors)
    if contender.name.startswith("grpo-fast"):  # no allowance for eager's rounding here
        assert all(error <= FLOORS[name] for name, error in errors.items())


def mutant(change: Any) -> Contender:
    """This library, its results changed afterwards."""

    def run(batch: Batch) -> Outcome:
        outcome = CONTENDERS["grpo-fast"].run(batch)
        change(batch, outcome)
        return outcome

    return Contender("mutant", run)


def _scale(name: str, factor: float) -> Any:
    return lambda batch, outcome: getattr(batch, name).grad.mul_(factor)


MUTATIONS: dict[str, Any] = {
    "grad_hidden": _scale("hidden", 1.05),
    "grad_weight": _scale("weight", 0.0),
    "loss": lambda batch, outcome: outcome.loss.add_(0.1),
    "logprobs": lambda batch, outcome: outcome.logprobs.add_(0.05),
    "entropy": lambda batch, outcome: outcome.entropy.mul_(1.02),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_contender_is_caught(name: str) -> None:
    _, complaint = check_small(mutant(MUTATIONS[name]), SCENARIOS["full"], None, "cpu")
    assert complaint is not None
    assert complaint.startswith(f"{name} error")


@pytest.mark.parametrize(
    ("scenario", "wrong"),
    [
        ("kl", LossConfig()),
        ("entropy_bonus", LossConfig()),
        ("gspo", LossConfig(loss_type="grpo")),
        ("ragged", LossConfig(loss_type="grpo")),
        ("full", LossConfig(loss_type="reinforce")),
    ],
)
def test_another_objective_is_caught(scenario: str, wrong: LossConfig) -> None:
    """Less than was asked for: the term of the scenario, its ratio or its aggregation left out."""

    def run(batch: Batch) -> Outcome:
        other = replace(batch.case, scenario=replace(batch.case.scenario, config=wrong))
        return CONTENDERS["grpo-fast"].run(replace(batch, case=other))

    assert check_small(Contender("mutant", run), SCENARIOS[scenario], None, "cpu")[1] is not None


def test_a_forgotten_soft_cap_is_caught() -> None:
    def run(batch: Batch) -> Outcome:
        uncapped = replace(batch.case, model=replace(batch.case.model, softcap=None))
        return CONTENDERS["grpo-fast"].run(replace(batch, case=uncapped))

    assert check_small(Contender("mutant", run), SCENARIOS["full"], 30.0, "cpu")[1] is not None


@pytest.mark.parametrize(
    "change", [_scale("hidden", math.nan), lambda batch, outcome: outcome.logprobs[3].fill_(math.nan)]
)
def test_not_a_number_is_caught(change: Any) -> None:
    _, complaint = check_small(mutant(change), SCENARIOS["full"], None, "cpu")
    assert complaint is not None


def test_a_missing_gradient_is_caught() -> None:
    def forget(batch: Batch, outcome: Outcome) -> None:
        batch.weight.grad = None

    with pytest.raises(AssertionError, match="left no grad_weight"):
        small_errors(mutant(forget), SCENARIOS["full"], None, "cpu")


@pytest.mark.parametrize("scenario", ["full", "half", "ragged"])
def test_rows_of_the_measured_shape_are_checked(scenario: str) -> None:
    batch = make_batch(replace(TINY, scenario=SCENARIOS[scenario]))
    sampled = SampledRows(batch)
    outcome = CONTENDERS["grpo-fast"].run(batch)
    errors, complaint = sampled.check(batch, outcome)
    assert complaint is None
    assert errors["logprobs"] < 1e-5
    assert outcome.logprobs is not None
    outcome.logprobs = torch.roll(outcome.logprobs, 1)
    assert sampled.check(batch, outcome)[1] is not None


def test_an_absent_package_is_named() -> None:
    reason = replace(CONTENDERS["QuACK"], module="no_such_package.kernels").why_missing()
    assert reason == "ModuleNotFoundError: No module named 'no_such_package'"
    assert CONTENDERS["QuACK"].why_not_offered(TINY, "cpu") == "runs on cuda only"


# -- cases ------------------------------------------------------------------------------------------------------------


def test_flops() -> None:
    one = 2 * 2048 * 576 * 49152
    products = {
        "full": 3,
        "half": 1.5,
        "frozen_head": 2,
        "no_grad": 1,
        "gspo": 3,
        "kl": 3,
        "entropy_bonus": 3,
        "ragged": 3,
    } | {name: 3 for name in SCENARIOS if name.startswith("support")}
    cases = {name: Case(MODELS["SmolLM2-135M"], 2048, scenario) for name, scenario in SCENARIOS.items()}
    assert {name: case.flops / one for name, case in cases.items()} == products


def test_bytes() -> None:
    hidden, weight = 2 * 2048 * 576, 2 * 49152 * 576
    sizes = {
        name: Case(MODELS["SmolLM2-135M"], 2048, SCENARIOS[name]).compulsory_bytes - 2048 * 40
        for name in ("full", "frozen_head", "no_grad")
    }
    assert sizes == {"full": 2 * (hidden + weight), "frozen_head": 2 * hidden + weight, "no_grad": hidden + weight}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.name)
def test_inputs_are_realistic(scenario: Any) -> None:
    case = Case(Model("small", 64, 2000), 512, scenario)
    batch = make_batch(case)
    assert sum(case.lengths) == 512
    assert min(case.lengths) >= 1
    assert (len(set(case.lengths)) > 1) == scenario.ragged
    logits = batch.hidden.detach().float() @ batch.weight.detach().float().T
    assert logits.std().item() == pytest.approx(2.5, rel=0.05)
    if batch.support is not None:
        logits = logits.masked_fill(~mask_of(batch.support, 2000), -math.inf)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert -batch.logprobs.mean().item() == pytest.approx(
        entropy.mean().item(), rel=0.1, abs=0.03
    )  # as of tokens drawn from the model
    active = (batch.advantages != 0).repeat_interleave(batch.cu_seqlens.diff()).sum()
    assert active == case.active_tokens
    ratio = (batch.logprobs - batch.old).exp()
    assert ((ratio - 1).abs() > 0.2).float().mean() < 0.01  # hardly a row is clipped, so none is skipped for that


@pytest.mark.parametrize("scenario", ["full", "ragged"])
def test_the_padded_layout_holds_the_same_tokens(scenario: str) -> None:
    packed = make_batch(replace(TINY, scenario=SCENARIOS[scenario]))
    padded = packed.padded()
    assert padded.targets.shape == (8, max(packed.case.lengths))
    for name in ("hidden", "targets", "old", "ref", "sequence_ids"):
        assert torch.equal(padded.packed(getattr(padded, name)), getattr(packed, name)), name
    shared = padded.hidden.data_ptr() == packed.hidden.data_ptr()
    assert shared == (scenario == "full")


def test_the_quick_selection() -> None:
    quick = {case.name for case in loss_cases("cpu") if is_quick(case)}
    scenarios = ("full", "half", "frozen_head", "no_grad", "gspo", "kl", "entropy_bonus", "support8")
    assert quick == {"Qwen3-0.6B-T1024-full", *(f"SmolLM2-135M-T2048-{name}" for name in scenarios)}


# -- measuring --------------------------------------------------------------------------------------------------------


def test_peak_memory_sees_what_a_call_takes() -> None:
    memory = PeakMemory()
    if memory.method is None:
        pytest.skip("resident memory cannot be reset here")
    kept = torch.ones(16 * MIB)
    memory.start()
    assert (torch.ones(8 * MIB) + 1).sum() > 0  # two tensors of 32 MiB at once, then freed
    peak = memory.stop()
    assert peak is not None
    assert 60 * MIB <= peak < 80 * MIB
    memory.start()
    again = memory.stop()
    assert again is not None
    assert again < 8 * MIB
    assert kept.sum() > 0


def test_slow_contenders_get_fewer_rounds() -> None:
    fast, slow = (Entry("entry", lambda: None, seconds=[seconds]) for seconds in (1.0, 9.0))
    assert fast.wants(5)
    assert slow.wants(5)
    fast.seconds, slow.seconds = [1.0] * 4, [9.0] * 2
    assert fast.wants(5)
    assert not slow.wants(5)
    fast.reject("failed", "wrong")
    assert not fast.wants(5)


def _contenders(patch: pytest.MonkeyPatch) -> list[str]:
    """A table of this library, plain, a wrong one and an absent one; returns the log of what ran."""
    log: list[str] = []

    def logged(contender: Contender) -> Contender:
        def run(batch: Batch) -> Outcome:
            if batch.case is TINY:
                log.append(contender.name)
            return contender.run(batch)

        return replace(contender, run=run)

    table = [CONTENDERS["grpo-fast"], CONTENDERS["plain log-softmax"], mutant(_scale("weight", 2.0))]
    table.append(replace(mutant(None), name="absent", module="no_such_package"))
    patch.setattr(measure, "CONTENDERS", {c.name: logged(c) for c in table})
    return log


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A record of a tiny case, as it comes back from a JSON file."""
    with pytest.MonkeyPatch.context() as patch:
        log = _contenders(patch)
        measurement = Measurement(TINY, rounds=5)
        measurement.prepare()
        warm = list(log)
        for _ in range(5):
            measurement.round()
    assert warm == ["grpo-fast", "plain log-softmax"]  # the wrong one is not run at the measured shape
    assert len(log) == 22
    assert log[2::2] == log[3::2]  # a short timed run follows an untimed one
    timed = log[3::2]
    rounds = [tuple(timed[i : i + 2]) for i in range(0, 10, 2)]
    assert all(set(order) == {"grpo-fast", "plain log-softmax"} for order in rounds)
    assert len(set(rounds)) == 2  # the order rotates
    result: dict[str, Any] = json.loads(json.dumps(measurement.record()))
    return result


def test_a_record_has_what_a_reader_needs(record: dict[str, Any]) -> None:
    by_name = {c["name"]: c for c in record["contenders"]}
    assert {name: c["status"] for name, c in by_name.items()} == {
        "grpo-fast": "timed",
        "plain log-softmax": "timed",
        "mutant": "failed",
        "absent": "not installed",
    }
    ours = by_name["grpo-fast"]
    assert ours["n"] == len(ours["seconds"]) == 5
    assert ours["min"] <= ours["median"] <= ours["max"]
    assert ours["floor_ratio"] == pytest.approx(ours["median"] / record["floor"]["median"])
    assert ours["floor_fraction"] == pytest.approx(1 / ours["floor_ratio"])
    assert ours["tflops"] == pytest.approx(TINY.flops / ours["median"] / 1e12)
    assert set(ours["errors"]) == {"logprobs", "entropy", "loss", "grad_hidden", "grad_weight"}
    assert set(record["floor"]["gemms"]) == {"logits", "grad_hidden", "grad_weight"}
    assert all(gemm["n"] == 5 for gemm in record["floor"]["gemms"].values())
    assert not {"median", "seconds", "tflops"} & set(by_name["mutant"])
    assert "grad_weight error" in by_name["mutant"]["reason"]
    assert "no_such_package" in by_name["absent"]["reason"]
    assert record["machine"]["torch"] == torch.__version__


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _contenders(monkeypatch)
    monkeypatch.setattr(measure, "available_bytes", lambda: 2**20)
    measurement = Measurement(TINY, ["plain log-softmax"])
    measurement.prepare()
    assert [entry.status for entry in measurement.entries] == ["too large"]
    assert Measurement(Case(MODELS["Qwen3-8B"], 1024, SCENARIOS["full"])).too_large() is not None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="nobody"):
        Measurement(TINY, ["nobody"])


# -- report -----------------------------------------------------------------------------------------------------------


def _file(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"benchmarks": [{"extra_info": record} for record in records]}))
    return path


def _grown(record: dict[str, Any], axis: str, case: Case) -> dict[str, Any]:
    values = {"tokens": case.tokens, "vocab": case.model.vocab, "active_tokens": case.active_tokens}
    return {**record, "growth": axis, "case": {**record["case"], "name": case.name, **values}}


def test_report(record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {axis: cases for axis, cases in growth_cases().items() if not axis.startswith("support")}
    grown = [_grown(record, axis, case) for axis, cases in axes.items() for case in cases]
    paths = [_file(tmp_path / "steps.json", [record]), _file(tmp_path / "growth.json", grown)]
    report.main([*map(str, paths), "--out", str(tmp_path / "out")])
    assert len(capsys.readouterr().out.splitlines()) == 3
    text = (tmp_path / "out" / "report.md").read_text()
    ours = next(c for c in record["contenders"] if c["name"] == "grpo-fast")
    assert f"| {ours['floor_ratio']:.2f} | {ours['tflops']:.2f} |" in text
    assert text.count("| failed |") == 1 + len(grown)
    assert "absent: not installed" in text
    plain = next(c for c in record["contenders"] if c["name"] == "plain log-softmax")
    slower = f"| plain log-softmax | {plain['median'] / ours['median']:.2f} "
    assert f"{slower}{slower}| 1.00 |" in text
    for name in ("time_vs_floor.png", "growth.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_report_keeps_machines_apart(record: dict[str, Any], tmp_path: Path) -> None:
    other = {**record, "machine": {**record["machine"], "threads": 64}, "case": {**record["case"], "name": "other"}}
    path = _file(tmp_path / "mixed.json", [record, other])
    with pytest.raises(ValueError, match="one machine"):
        report.load([path])
    with pytest.raises(ValueError, match="got none"):
        report.load([_file(tmp_path / "empty.json", [])])


def _machine(record: dict[str, Any], device: str) -> dict[str, Any]:
    facts = {**record["machine"], "device": device, "gpu": "GPU", "driver": "1", "cuda": "13.0"}
    return {**record, "machine": facts}


def _contender(record: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """A timed contender of a record under another name."""
    plain = next(c for c in record["contenders"] if c["name"] == "plain log-softmax")
    return {**plain, "name": name, "package": name, **changes}


def test_nobody_beats_a_floor_but_a_reference(record: dict[str, Any]) -> None:
    on_cpu, on_gpu = (report.markdown([_machine(record, device)]) for device in ("cpu", "cuda"))
    assert "| reference GEMMs (logits + grad_hidden + grad_weight) |" in on_cpu
    assert "x reference" in on_cpu
    assert "floor" not in on_cpu.replace("no floor", "")
    assert "| floor GEMMs (logits + grad_hidden + grad_weight) |" in on_gpu
    assert "x floor" in on_gpu
    assert "reference" not in on_gpu


def test_spread(record: dict[str, Any]) -> None:
    ours = next(c for c in record["contenders"] if c["name"] == "grpo-fast")
    floor = record["floor"]["median"]
    span = f"({ours['min'] / floor:.2f} to {ours['max'] / floor:.2f})"
    assert report.spread(record, ours) == f"{ours['floor_ratio']:.2f} {span}"
    assert f"| {ours['floor_ratio']:.2f} {span} |" in "\n".join(report.summary([record]))


def test_the_fastest_competitors(record: dict[str, Any]) -> None:
    """With entropies and of all; who was faster at the full step and is not timed elsewhere is named."""
    ours = next(c for c in record["contenders"] if c["name"] == "grpo-fast")

    def rivals(*named: tuple[str, float, bool]) -> list[dict[str, Any]]:
        return [_contender(record, n, median=f * ours["median"], entropy=entropy) for n, f, entropy in named]

    eager, bf16, cut = ("TRL eager", 4.0, True), ("TRL eager bf16", 1.5, True), ("cut", 1.25, False)
    full = {**record, "contenders": [ours, *rivals(eager, bf16, cut)]}
    case = {**record["case"], "scenario": "kl", "name": "kl", "title": "KL"}
    few = {**record, "case": case, "contenders": [ours, *rivals(eager)]}
    of_full, of_few, _, note = report.summary([full, few])[2:]
    assert "| TRL eager bf16 | 1.50 | cut * | 1.25 | 1.00 |" in of_full
    assert "| TRL eager + | 4.00 | TRL eager + | 4.00 | 1.00 |" in of_few
    assert note == "+: faster at the same head's full step, and not timed here: TRL eager bf16."
    everyone = {**few, "contenders": full["contenders"]}
    assert not any("+" in line for line in report.summary([full, everyone]))


def test_names_say_what_ran(record: dict[str, Any], tmp_path: Path) -> None:
    old = [_contender(record, name) for name in ("cut-cross-entropy", "Liger fused", "Liger fused (one chunk)")]
    for device, cut in (("cpu", "cut-cross-entropy (torch.compile)"), ("cuda", "cut-cross-entropy")):
        (loaded,) = report.load([_file(tmp_path / "old.json", [_machine({**record, "contenders": old}, device)])])
        names = [c["name"] for c in loaded["contenders"]]
        assert names == [cut, "Liger fused (not compiled)", "Liger fused (one chunk, not compiled)"]
    # A record of today lists both forms, one of them as not offered.
    both = [_contender(record, "cut-cross-entropy"), _contender(record, "cut-cross-entropy (torch.compile)")]
    (loaded,) = report.load([_file(tmp_path / "new.json", [_machine({**record, "contenders": both}, "cpu")])])
    assert [c["name"] for c in loaded["contenders"]] == [c["name"] for c in both]
    for name in report.FULL_NAMES.values():
        assert name in CONTENDERS
    assert CONTENDERS["cut-cross-entropy"].why_not_offered(TINY, "cpu") == "runs on cuda only"
    assert CONTENDERS["cut-cross-entropy (torch.compile)"].why_not_offered(TINY, "cuda") == "runs on cpu only"


def test_competitors_run_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's default is to compile, and TRL's bf16 path is among those timed in every scenario."""
    built: list[dict[str, Any]] = []

    def remember(**options: Any) -> None:
        built.append(options)
        raise InterruptedError

    liger = SimpleNamespace(LigerFusedLinearGRPOLoss=remember)
    monkeypatch.setattr(implementations.importlib, "import_module", lambda name: liger)
    for name in ("Liger fused (compiled)", "Liger fused (not compiled)", "Liger fused (one chunk, not compiled)"):
        with pytest.raises(InterruptedError):
            CONTENDERS[name].run(make_batch(TINY).padded())
    assert [options["compiled"] for options in built] == [True, False, False]
    assert [options["chunk_size"] for options in built] == [1, 1, TINY.sequences]
    assert "TRL eager bf16" in FEW
