"""Benchmarks with supports: sizes and ids, who takes part and is checked against what, records, charts, the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import charts, machine, measure, report, support_demo, support_figure, support_sizes, supports
from benchmarks.baselines import CONTENDERS, MASKED, ON_SUPPORTS, SPARSE, Contender, Outcome, implementations
from benchmarks.cases import SCENARIOS, Batch, Case, Model, Scenario, growth_cases, make_batch
from benchmarks.measure import Measurement
from benchmarks.oracle import SampledRows, check_small
from grpo_fast.loss import sparse_limit
from grpo_fast.packing import Support

ON_SUPPORT = {name: scenario for name, scenario in SCENARIOS.items() if scenario.support is not None}
TINY = Case(Model("tiny", 32, 2000), 64, SCENARIOS["support64"], sequences=8)
CPU = torch.device("cpu")


# -- sizes and ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "rows"), [(8, 1024), (8, 2048), (64, 1024), (64, 2048)])
def test_long_tailed_sizes(mean: int, rows: int) -> None:
    sizes = supports.support_sizes(f"mean {mean}", rows, 151936)
    assert sizes.double().mean().item() == pytest.approx(mean, rel=0.005)
    assert (sizes == 1).double().mean().item() == pytest.approx(0.4, abs=0.001)
    assert sizes.min() == 1
    assert sizes.double().median() < mean / 3
    assert sizes.max() > 20 * mean
    assert not torch.equal(sizes, sizes.sort().values)
    assert torch.equal(sizes, supports.support_sizes(f"mean {mean}", rows, 151936))


def test_recorded_sizes_keep_their_distribution() -> None:
    models = json.loads(supports.RECORDED.read_text())["models"]
    assert set(models) == {"untrained", "trained"}
    for name, model in models.items():
        assert model["top_p"] == 0.95
        assert sum(model["sizes"].values()) == model["tokens"]
        exact = supports.support_sizes(f"recorded {name}", model["tokens"], 49152)
        assert exact.double().mean().item() == pytest.approx(model["mean"])
        sizes = supports.support_sizes(f"recorded {name}", 2048, 49152)
        assert sizes.double().median().item() == pytest.approx(model["median"], abs=1)
        assert (sizes == 1).double().mean().item() == pytest.approx(model["singleton_fraction"], abs=0.002)


def test_constant_sizes_and_the_vocabulary() -> None:
    assert supports.support_sizes("constant 64", 5, 1000).tolist() == [64] * 5
    assert supports.support_sizes("constant 1600", 2, 1000).tolist() == [500] * 2
    assert supports.support_sizes("mean 64", 2048, 300).max() == 300
    with pytest.raises(ValueError, match="got 'median 8'"):
        supports.support_sizes("median 8", 4, 100)


def test_ids_are_shared_like_words() -> None:
    generator = torch.Generator().manual_seed(0)
    support = supports.draw_support("constant 8", 512, 5000, CPU, generator)
    Support(support.token_ids, support.offsets)  # distinct ids in each row
    counts = support.token_ids.long().bincount(minlength=5000)
    assert support.sizes.tolist() == [8] * 512
    assert counts.max() > 100  # the most frequent word is in every fifth row or more
    assert (counts > 0).sum() > 500  # and most words are rare
    assert int(counts.argmax()) != 0
    first = supports.draw_support("mean 8", 300, 5000, CPU, torch.Generator().manual_seed(1))  # three blocks of rows
    assert torch.equal(first.sizes, supports.support_sizes("mean 8", 300, 5000))


@pytest.mark.parametrize("scenario", ON_SUPPORT.values(), ids=lambda s: s.name)
def test_a_batch_with_supports(scenario: Scenario) -> None:
    batch = make_batch(replace(TINY, scenario=scenario))
    support, dense = batch.support, batch.dense()
    assert support is not None
    mask = supports.mask_of(support, 2000)
    assert mask[torch.arange(64), batch.targets].all()
    assert torch.equal(mask.sum(1), support.sizes)
    single = support.sizes == 1
    assert torch.equal(batch.logprobs[single], torch.zeros(int(single.sum())))
    assert torch.equal(batch.old[single], batch.logprobs[single])
    assert dense.support is None
    assert (dense.logprobs[support.sizes < 2000] < batch.logprobs[support.sizes < 2000]).all()
    # A step over the whole vocabulary clips as little as one on the supports.
    assert torch.allclose(dense.old - dense.logprobs, batch.old - batch.logprobs, atol=1e-5)
    with pytest.raises(AssertionError, match="without supports"):
        batch.padded()


def test_an_empty_row_is_the_whole_vocabulary() -> None:
    support = Support(torch.tensor([3, 1]), torch.tensor([0, 2, 2]))
    assert supports.mask_of(support, 4).tolist() == [[False, True, False, True], [True] * 4]


def test_what_a_record_says_of_supports() -> None:
    support = Support(torch.tensor([5, 1, 2, 0, 1, 2, 3, *range(6)]), torch.tensor([0, 1, 3, 7, 13, 13]))
    found = supports.facts(support, "constant 2", 6, 2)
    assert (found["mean"], found["median"], found["max"]) == (13 / 5, 2.0, 6)
    assert (found["token_ids"], found["distinct_ids"], found["sparse_limit"]) == (13, 6, 2)
    assert found["shares"] == {"single": 0.2, "sparse": 0.2, "masked": 0.2, "whole": 0.4}


# -- who takes part, and is checked against what ----------------------------------------------------------------------


def test_who_is_timed_with_supports() -> None:
    assert Measurement(TINY, ON_SUPPORTS).names == [
        "grpo-fast",
        "grpo-fast dense",
        "grpo-fast torch",
        "plain log-softmax",
    ]
    without = Measurement(replace(TINY, scenario=SCENARIOS["full"])).names
    assert not {"grpo-fast dense", SPARSE, MASKED} & set(without)
    assert {SPARSE, MASKED} <= set(Measurement(TINY).names)
    assert CONTENDERS["TRL eager"].why_not_offered(TINY, "cpu") == "takes no supports"
    dense = replace(TINY, scenario=SCENARIOS["full"])
    assert CONTENDERS[SPARSE].why_not_offered(dense, "cpu") == "is for cases with supports"


def _mutant(run: Callable[[Batch], Outcome]) -> Contender:
    return Contender("mutant", run, support="takes")


def _own_with(support: Callable[[Support], Support | None]) -> Contender:
    own = CONTENDERS["grpo-fast"].run

    def run(batch: Batch) -> Outcome:
        assert batch.support is not None
        return own(replace(batch, support=support(batch.support)))

    return _mutant(run)


def _larger(support: Support) -> Support:
    """One more token in each row."""
    rows = []
    for row in range(support.num_rows):
        ids = support[row : row + 1].token_ids.tolist()
        rows.append([*ids, next(v for v in range(1000) if v not in ids)] if len(ids) < 1000 else ids)
    sizes = torch.tensor([0, *map(len, rows)])
    return Support(torch.tensor([v for row in rows for v in row]), sizes.cumsum(0))


@pytest.mark.parametrize("change", [lambda support: None, _larger], ids=["none", "larger"])
def test_another_support_is_caught(change: Any) -> None:
    wrong = _own_with(change)
    _, complaint = check_small(wrong, SCENARIOS["support8"], None, "cpu")
    assert complaint is not None
    batch = make_batch(TINY)
    if change is not _larger:
        assert SampledRows(batch).check(batch, wrong.run(batch))[1] is not None


def test_the_dense_step_is_judged_on_the_whole_vocabulary() -> None:
    dense = CONTENDERS["grpo-fast dense"]
    assert check_small(dense, SCENARIOS["support8"], None, "cpu")[1] is None
    seen: list[Batch] = []

    def run(batch: Batch) -> Outcome:
        seen.append(batch)
        return dense.run(batch)

    logged = replace(dense, run=run)
    assert check_small(logged, SCENARIOS["support8"], None, "cpu")[1] is None
    assert all(batch.support is None for batch in seen)
    assert check_small(replace(logged, support="takes"), SCENARIOS["support8"], None, "cpu")[1] is None  # on supports
    batch = make_batch(TINY)
    assert SampledRows(batch.dense()).check(batch, dense.run(dense.view(batch)))[1] is None
    assert SampledRows(batch).check(batch, dense.run(dense.view(batch)))[1] is not None


@pytest.mark.parametrize(("name", "share"), [(SPARSE, 1), (MASKED, 2000)])
def test_forced_ways(name: str, share: int) -> None:
    """The limit is what was asked for while the contender runs, and its own again afterwards; results are the same."""
    batch = make_batch(TINY)
    before = sparse_limit(batch.weight)
    limits: list[int] = []
    real = measure.CONTENDERS["grpo-fast"].run(batch)
    with pytest.MonkeyPatch.context() as patch:
        loss = implementations.grpo_loss

        def logged(*tensors: Any, **options: Any) -> Any:
            limits.append(sparse_limit(batch.weight))
            return loss(*tensors, **options)

        patch.setattr(implementations, "grpo_loss", logged)
        outcome = CONTENDERS[name].run(batch)
    assert limits == [2000 // share]
    assert sparse_limit(batch.weight) == before
    assert outcome.logprobs is not None
    assert real.logprobs is not None
    assert torch.allclose(outcome.logprobs, real.logprobs, atol=1e-4)


# -- records and charts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    measurement = Measurement(TINY, ON_SUPPORTS, rounds=2)
    measurement.prepare()
    for _ in range(2):
        measurement.round()
    result: dict[str, Any] = json.loads(json.dumps(measurement.record()))
    return result


def _by_name(record: dict[str, Any]) -> dict[str, Any]:
    return {c["name"]: c for c in record["contenders"] if c["status"] == "timed"}


def test_a_record_with_supports(record: dict[str, Any]) -> None:
    timed = _by_name(record)
    assert {"grpo-fast", "grpo-fast dense", "plain log-softmax"} <= set(timed)
    assert record["support"]["kind"] == "mean 64"
    assert record["support"]["mean"] == pytest.approx(64, rel=0.02)
    assert sum(record["support"]["shares"].values()) == pytest.approx(1)
    assert timed["grpo-fast"]["errors"]["logprobs"] < 1e-5
    plain = measure.Measurement(replace(TINY, scenario=SCENARIOS["full"]), ["grpo-fast"], rounds=1)
    plain.prepare()
    plain.round()
    assert plain.record()["support"] is None


def test_tables_compare_with_the_dense_step(record: dict[str, Any]) -> None:
    timed = _by_name(record)
    ratio = timed["grpo-fast"]["median"] / timed["grpo-fast dense"]["median"]
    assert report.headers(record)[5] == "x dense"
    text = report.markdown([record])
    assert f"| {timed['grpo-fast']['floor_ratio']:.2f} | {ratio:.3f} |" in text
    assert f"| {timed['grpo-fast dense']['floor_ratio']:.2f} | 1.000 |" in text
    assert f"| {ratio:.3f} |" in "\n".join(report.summary([record]))
    assert report.support_line(record["support"]) in text
    assert "mean 64" in report.text_table(record)
    old = {name: value for name, value in record.items() if name != "support"}
    assert report.headers(old)[5] == "TFLOP/s"


def _grown(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of every case of the growth tests with supports."""
    dense = _by_name(record)["grpo-fast dense"]
    grown = []
    for axis, cases in growth_cases().items():
        if not axis.startswith("support"):
            continue
        for case in cases:
            size = case.scenario.support.split()[1] if case.scenario.support else "0"
            gradients = 2 * case.model.hidden * (case.tokens + case.model.vocab)
            names = ("grpo-fast", "grpo-fast dense") if axis == "support_vocab" else (SPARSE, MASKED, "grpo-fast dense")
            contenders = [
                {
                    **dense,
                    "name": name,
                    "median": 0.1 * (1 + i),
                    "min": 0.1,
                    "max": 0.5,
                    "peak_bytes": gradients + 2**23,
                }
                for i, name in enumerate(names)
            ]
            grown.append(
                {
                    **record,
                    "growth": axis,
                    "contenders": contenders,
                    "case": {
                        **record["case"],
                        "name": case.name,
                        "model": case.model.name,
                        "hidden": case.model.hidden,
                        "vocab": case.model.vocab,
                        "gradient_bytes": gradients,
                    },
                    "support": {**record["support"], "mean": float(size)},
                }
            )
    return grown


def test_growth_with_supports_has_a_chart_of_its_own(record: dict[str, Any], tmp_path: Path) -> None:
    grown = _grown(record)
    assert {r["support"]["mean"] for r in grown if "size" in r["growth"]} == {2, 8, 32, 128, 512, 2048, 8192, 16384}
    assert [charts.extra_bytes(c, r) for r in grown[:1] for c in r["contenders"]] == [2**23, 2**23]
    assert math.isnan(charts.extra_bytes({"peak_bytes": None}, record))
    points = charts._series(grown, "support_size_Qwen3-0.6B")[SPARSE]
    assert [x for x, _, _ in points] == [2, 8, 32, 128, 512, 2048, 8192, 16384]
    assert charts.tick_labels([2, 8, 32, 64]) == ["2", "8", "", "64"]
    assert charts.tick_labels([2, 4, 8]) == ["2", "4", "8"]
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in [record, *grown]]}))
    written = report.write([path], tmp_path / "charts")
    assert [p.name for p in written] == ["report.md", "time_vs_floor.png", "growth_support.png"]
    assert all(p.stat().st_size > 0 for p in written)


# -- recording sizes, and the picture ---------------------------------------------------------------------------------


def test_what_is_recorded_of_a_completion() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    kept = torch.tensor([[True, True, True, False], [True, False, False, False]])
    scores = probabilities.log().masked_fill(~kept, -math.inf)
    seen = support_sizes.Seen()
    seen.add(torch.tensor([1, 0]), probabilities.log(), scores)
    assert seen.sizes == [3, 1]
    assert seen.ratios == pytest.approx([0.95, 0.97])  # the mass that was kept
    assert seen.completion_ratios == pytest.approx([0.95 * 0.97])
    assert seen.support_ratios == pytest.approx([1.0, 1.0])
    found = seen.record()
    assert found["sizes"] == {"1": 1, "3": 1}
    assert (found["mean"], found["singleton_fraction"], found["tokens"]) == (2, 0.5, 2)
    assert sum(found["ratio"]["counts"]) == 2
    counts = support_sizes.histogram([-1.0, 0.0, 0.25, 0.99, 7.0], [0.0, 0.5, 1.0])["counts"]
    assert counts == [3, 2]


def test_sampling_stops_at_the_end_of_text() -> None:
    """A stand-in for a model: the second completion ends after a token, what follows is padding."""
    logits = [torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]), torch.zeros(2, 3)]
    scores = [part.clone() for part in logits]
    scores[0][1, :2] = -math.inf
    asked: dict[str, Any] = {}

    def generate(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(sequences=torch.tensor([[7, 0, 1], [7, 2, 0]]), logits=logits, scores=scores)

    model = SimpleNamespace(generate=generate, generation_config=SimpleNamespace(eos_token_id=2))
    seen = support_sizes.sample(model, [[7]], completions=2, length=2, top_p=0.9)
    assert seen.sizes == [3, 3, 1]
    assert len(seen.completion_ratios) == 2
    assert (asked["top_p"], asked["top_k"], asked["temperature"], asked["max_new_tokens"]) == (0.9, 0, 1.0, 2)


def test_the_picture_of_supports(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in _grown(record)]}))
    support_figure.main([str(path), "--out", str(tmp_path / "support.png")])
    assert (tmp_path / "support.png").read_bytes().startswith(b"\x89PNG")
    sizes, times = support_figure.ratios_to_dense(report.load([path]), "support_size_Qwen3-0.6B")[SPARSE]
    assert sizes == [2, 8, 32, 128, 512, 2048, 8192, 16384]
    assert times == pytest.approx([1 / 3] * 8)
    with pytest.raises(ValueError, match="no growth"):
        support_figure.ratios_to_dense([record], "support_size_Qwen3-0.6B")


# -- the demo with and without ----------------------------------------------------------------------------------------


def _demo_run(folder: Path, rewards: list[float], update: float, **first: float) -> None:
    folder.mkdir(parents=True)
    rows: list[dict[str, float]] = [{"step": 0, "eval/reward": 0.1}]
    rows += [
        {"step": i, "reward": r, "time/update": update, "time/rollout": 1.0, "num_tokens": 100.0 * i}
        for i, r in enumerate(rewards, start=1)
    ]
    rows[1] |= first
    rows.append({"step": len(rewards), "eval/reward": rewards[-1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_demo_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="got none"):
        support_demo.load(tmp_path)
    for seed in range(3):
        rewards = [0.01 * seed] * 10 + [0.5 + 0.1 * seed] * 10
        _demo_run(tmp_path / f"everything-seed{seed}", rewards, 2.0, **{"ratio/min": 1.0})
        _demo_run(tmp_path / f"support-seed{seed}", rewards, 0.5 + seed, **{"ratio/min": 1.0, "support/mean": 9.0})
    _demo_run(tmp_path / "off-seed0", [0.25] * 20, 2.0, **{"ratio/min": 0.95})
    support_demo.main(["--out", str(tmp_path), "--report"])
    said = capsys.readouterr().out
    assert said.strip() == (tmp_path / "support_demo.md").read_text().strip()
    last = "| reward, mean of the last 10 steps | 0.6 (0.5 to 0.7) | 0.6 (0.5 to 0.7) | 0.25 (0.25 to 0.25) |"
    assert last in said
    assert "| seconds of a step's update | 2 (2 to 2) | 1.5 (0.5 to 2.5) | 2 (2 to 2) |" in said
    assert "| the same, ms a token | 20 (20 to 20) |" in said
    assert "| first step: least ratio | 1 (1 to 1) | 1 (1 to 1) | 0.95 (0.95 to 0.95) |" in said
    assert "| support, mean |  | 9 (9 to 9) |  |" in said
    assert "ratio/max" not in said
    assert "top-p 1: 0, 1, 2;" in said
    assert (tmp_path / "support_demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_runs_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        folder = Path(next(o for o in command if o.startswith("output_dir=")).partition("=")[2])
        _demo_run(folder, [0.5] * 6, 1.0)
        (folder / "config.yaml").write_text("seed: 0\n")
        return SimpleNamespace(returncode=int("loss.support=off" in command))

    monkeypatch.setattr(machine, "machine_facts", lambda: {"torch": torch.__version__})
    monkeypatch.setattr(support_demo.subprocess, "run", run)
    given = ["--out", str(tmp_path), "--seeds", "0", "4", "--set", "max_steps=6"]
    support_demo.main([*given, "--arms", "everything", "support"])
    assert [[o for o in command if "top_p" in o or o.startswith("seed")] for command in commands] == [
        ["rollout.top_p=1.0", "seed=0"],
        ["rollout.top_p=0.95", "seed=0"],
        ["rollout.top_p=1.0", "seed=4"],
        ["rollout.top_p=0.95", "seed=4"],
    ]
    assert all("max_steps=6" in command and "export_final=false" in command for command in commands)
    assert (tmp_path / "support-seed4" / "config.yaml").exists()
    assert json.loads((tmp_path / "machine.json").read_text())["torch"] == torch.__version__
    commands.clear()
    with pytest.raises(SystemExit, match="off, seed 0: exit code 1"):
        support_demo.main(given)
    assert len(commands) == 1
    assert not (tmp_path / "off-seed0").exists()
