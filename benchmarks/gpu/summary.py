"""One screen from the files of the parts: what was measured, each target PASS or MISS with its number, what to decide.

Written to summary.txt, and as Markdown (the same lines in a block) to summary.md. Reads nothing but the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.store import read, write_atomically

Record = dict[str, Any]
FLOOR_TARGETS = {4096: 0.92, 2048: 0.88, 1024: 0.80}
"""H: the share of the GEMM floor that a full or frozen-head step should reach with 2.5 GiB."""
NO_GRAD_TARGET, HALF_TARGET = 0.90, 0.55
ALLOWANCE = {"2.5 GiB": 0.0, "1 GiB": 0.05, "0.25 GiB": 0.15}
"""By how much less is allowed with a smaller workspace."""
PEER_TARGETS = {"TRL chunked": 1.3, "Liger fused": 5.0, "verl Triton": 1.0, "verl torch": 1.0, "cut-cross-entropy": 1.0}
"""Competitor: how many times faster than it this library should be."""
STREAM_GAIN = 0.05
"""Two streams must gain this much of the time, at the workspace that has room for them, to be kept."""
TILE_GAIN = 0.02


def write_summary(out: Path) -> str:
    """Draw it, write it, return it."""
    text = "\n".join(lines(out))
    write_atomically(out / "summary.txt", text + "\n")
    write_atomically(out / "summary.md", f"# What `make gpu` measured\n\n```text\n{text}\n```\n")
    return text


def lines(out: Path) -> list[str]:
    files = {name: read(out / f"{name}.json") for name in PARTS}
    made = {name: file["measurements"] for name, file in files.items()}
    machines = [file["machine"] for file in files.values() if "machine" in file]
    verdicts = list(targets(made))
    missed = sum(mark == "MISS" for mark, _ in verdicts)
    text = [*_head(machines), *_states(made), *_floors(made["floor"]), *_rows(made["rows"])]
    text += [f"{mark:<5}{what}" for mark, what in verdicts]
    text += [f"decide {what}" for what in decisions(made["tuning"])]
    open_ones = [name for name in PARTS if not made[name]]
    passed = len(verdicts) - missed
    end = f"{passed} targets met, {missed} missed" if verdicts else "no target was measured"
    text.append(f"verdict: {end}" + (f"; not begun: {', '.join(open_ones)}" if open_ones else ""))
    return text


def _results(measurements: Mapping[str, Record]) -> dict[str, Any]:
    return {key: made["result"] for key, made in measurements.items() if made["status"] == "ok" and "result" in made}


# -- what there is ----------------------------------------------------------------------------------------------------


def _head(machines: Sequence[Record]) -> Iterator[str]:
    if not machines:
        yield "nothing has been measured yet"
        return
    m = machines[0]
    commit = str(m["commit"])[:12] + {True: " (changed)", False: "", None: " (changed or not: unknown)"}[m["dirty"]]
    yield f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}"
    yield f"commit {commit} says {m['commit_from']}, sources {m['sources']}"
    if m["stand_in"]:
        yield "A STAND-IN, NO GPU: the times and verdicts below mean nothing"
    others = {other["sources"] for other in machines} - {m["sources"]}
    if others:
        yield f"some parts are of other sources: {', '.join(sorted(others))}"


def _states(made: Mapping[str, Mapping[str, Record]]) -> Iterator[str]:
    """A line a part: counts, and the first failure."""
    for name, measurements in made.items():
        counts = {state: [k for k, m in measurements.items() if m["status"] == state]
                  for state in ("ok", "failed", "skipped", "running")}  # fmt: skip
        words = [f"{len(keys)} {state}" for state, keys in counts.items() if keys]
        line = f"{name:<10} {', '.join(words) or 'not begun'}"
        for state in ("failed", "skipped"):
            if counts[state]:
                key = counts[state][0]
                reason = (measurements[key].get("reason") or "?").strip().splitlines()[-1]
                line += f"; {key}: {reason}"
                break
        yield line[:118]
    yield from _tests(made["right"])


def _tests(measurements: Mapping[str, Record]) -> Iterator[str]:
    for result in _results(measurements).values():
        first = next(iter(result["failures"]), None)
        tail = f"; first failure {first}" if first else ""
        counts = ", ".join(f"{result[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        yield f"tests      {counts}{tail}"[:118]


def _floors(measurements: Mapping[str, Record]) -> Iterator[str]:
    """Fractions of the floor by head and backend; columns are workspaces."""
    header = False
    for key, result in _results(measurements).items():
        if "steps" not in result:
            continue
        if not header:
            header = True
            names = list(dict.fromkeys(name.split(" at ")[1] for name in result["steps"]))
            yield f"{'share of the GEMM floor':<34}{'logits GEMM':>12}{'scenario':>13}" + "".join(
                f"{name:>18}" for name in names
            )
        tflops = result["gemm_tflops"]["logits"]
        scenarios = dict.fromkeys(name.split(" at ")[0] for name in result["steps"])
        for number, scenario in enumerate(scenarios):
            cells = []
            for name in names:
                step = result["steps"].get(f"{scenario} at {name}", {})
                cells.append(
                    f"{step['fraction']:.2f} {step['median'] * 1e3:7.1f} ms" if "fraction" in step else "failed"
                )
            left = f"{key:<34}{tflops:>8.0f} TF/s" if number == 0 else " " * 46
            yield left + f"{scenario:>13}" + "".join(f"{cell:>18}" for cell in cells)


def _rows(measurements: Mapping[str, Record]) -> Iterator[str]:
    """Row kernels: share of a copy's speed."""
    for key, result in _results(measurements).items():
        cells = []
        for kernel in ("statistics", "gradient", "objective"):
            numbers = result.get(kernel, {})
            cells.append(
                f"{kernel} {numbers['fraction']:.2f} ({numbers['gigabytes_per_second']:.0f} GB/s)"
                if "fraction" in numbers
                else f"{kernel} failed"
            )
        yield f"row kernels of a copy, {key}: {', '.join(cells)}"[:118]


# -- verdicts ---------------------------------------------------------------------------------------------------------


def targets(made: Mapping[str, Mapping[str, Record]]) -> Iterator[tuple[str, str]]:
    """(PASS or MISS, what with its number)."""
    yield from _floor_targets(made["floor"])
    yield from _peer_targets(made["scenarios"])
    yield from _memory_targets(made["memory"])
    for result in _results(made["right"]).values():
        yield _mark(result["failed"] == 0), f"tests: {result['failed']} of {result['passed'] + result['failed']} failed"


def _mark(met: bool) -> str:
    return "PASS" if met else "MISS"


def _role(result: Record) -> int | None:
    """The hidden size that the targets speak of; tiny heads are called after it."""
    hidden = result["hidden"]
    name = str(result["model"]).rpartition("-")[2]
    return hidden if hidden in FLOOR_TARGETS else int(name) if name.isdigit() and int(name) in FLOOR_TARGETS else None


def _floor_targets(measurements: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """One line a head, of the backend that comes first; every workspace in it."""
    seen = set()
    for result in _results(measurements).values():
        role = _role(result) if "steps" in result else None
        if role is None or (role, result["vocab"]) in seen:
            continue
        seen.add((role, result["vocab"]))
        aims = {"full": FLOOR_TARGETS[role], "frozen_head": FLOOR_TARGETS[role], "no_grad": NO_GRAD_TARGET}
        for scenario, aim in aims.items():
            met, words = True, []
            for label, allowance in ALLOWANCE.items():
                fraction = result["steps"].get(f"{scenario} at {label}", {}).get("fraction", 0.0)
                met = met and fraction >= aim - allowance
                words.append(f"{fraction:.3f} (>= {aim - allowance:.2f} at {label})")
            yield _mark(met), f"{result['model']} {result['backend']} {scenario}: {', '.join(words)}"
        half, full = (result["steps"].get(f"{name} at 2.5 GiB", {}).get("median") for name in ("half", "full"))
        if half and full:
            share = half / full
            words = f"{share:.2f} of the dense time (<= {HALF_TARGET})"
            yield _mark(share <= HALF_TARGET), f"{result['model']} half of the groups at zero advantage: {words}"


def _peer_targets(measurements: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """The worst case of each competitor over all shapes and scenarios."""
    worst: dict[str, tuple[float, str]] = {}
    for record in _results(measurements).values():
        timed = {c["name"]: c["median"] for c in record["contenders"] if c["status"] == "timed"}
        if "grpo-fast" not in timed:
            continue
        for name in PEER_TARGETS.keys() & timed.keys():
            ratio = timed[name] / timed["grpo-fast"]
            worst[name] = min(worst.get(name, (float("inf"), "")), (ratio, record["case"]["name"]))
    for name, aim in PEER_TARGETS.items():
        if name in worst:
            ratio, case = worst[name]
            yield _mark(ratio >= aim), f"{ratio:.2f} times as fast as {name} at least (>= {aim}; {case})"


def _memory_targets(measurements: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    found = [
        (key, name, peak) for key, result in _results(measurements).items() for name, peak in result["peaks"].items()
    ]
    known = [(key, name, peak) for key, name, peak in found if peak.get("peak_bytes") is not None]
    if known:
        key, name, peak = max(known, key=lambda entry: entry[2]["peak_bytes"] / entry[2]["bound_bytes"])
        share = peak["peak_bytes"] / peak["bound_bytes"]
        within = all(entry[2]["within"] for entry in known)
        yield _mark(within), f"peak memory: at most {share:.2f} of cap, gradients and O(T H) ({key}, {name})"


def decisions(measurements: Mapping[str, Record]) -> Iterator[str]:
    """What the tuning says of the second stream and of tile rows, over all heads."""
    gains: dict[str, list[float]] = {}
    tiles: dict[str, list[float]] = {}
    for result in _results(measurements).values():
        steps = {tuple(name.split(", ")): numbers for name, numbers in result["steps"].items() if "median" in numbers}
        all_rows = list(dict.fromkeys(rows for _, rows, _ in steps))
        for (workspace, rows, stream), numbers in steps.items():
            one = steps.get((workspace, rows, "one stream"))
            if stream == "two streams" and one is not None and numbers.get("budget", {}).get("num_buffers", 1) > 1:
                gains.setdefault(workspace, []).append(1 - numbers["median"] / one["median"])
            small = steps.get((workspace, all_rows[0], stream))
            if stream == "one stream" and rows != all_rows[0] and small is not None:
                tiles.setdefault(workspace, []).append(1 - numbers["median"] / small["median"])
    if gains:
        best = max(gains, key=lambda name: sum(gains[name]) / len(gains[name]))
        mean = sum(gains[best]) / len(gains[best])
        keep = "keep" if mean >= STREAM_GAIN else "remove"
        words = ", ".join(f"{name}: {min(g):+.1%} to {max(g):+.1%}" for name, g in gains.items())
        yield f"second stream gains {mean:.1%} at best ({words}): {keep} (keep from {STREAM_GAIN:.0%})"
    elif measurements:
        yield "second stream: no workspace had room for two buffers"
    for name, gained in tiles.items():
        mean = sum(gained) / len(gained)
        choice = "larger" if mean >= TILE_GAIN else "smaller" if mean <= -TILE_GAIN else "either"
        yield f"tile rows at {name}: the larger gains {mean:+.1%} ({min(gained):+.1%} to {max(gained):+.1%}): {choice}"
