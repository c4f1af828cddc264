"""One screen from the files of the parts: what was measured, each target PASS or MISS with its number, what to decide.

Written to summary.txt, and as Markdown (the same lines in a block) to summary.md. Reads nothing but the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.store import IDENTITY, read, write_atomically

Record = dict[str, Any]
FLOOR_TARGETS = {4096: 0.92, 2048: 0.88, 1024: 0.80}
"""H: the share of the GEMM floor that a full or frozen-head step should reach with 2.5 GiB."""
NO_GRAD_TARGET, HALF_TARGET = 0.90, 0.55
ALLOWANCE = {"2.5 GiB": 0.0, "1 GiB": 0.05, "0.25 GiB": 0.15}
"""By how much less is allowed with a smaller workspace."""
PEER_TARGETS = {
    "TRL chunked": 1.3,
    "Liger fused (compiled)": 5.0,
    "verl Triton": 1.0,
    "verl torch": 1.0,
    "cut-cross-entropy": 1.0,
}
"""Competitor: how many times faster than it this library should be."""
STREAM_GAIN = 0.05
"""Two streams must gain this much of the time, at the workspace that has room for them, to be kept."""
TILE_GAIN = 0.02
WIDTH = 130


def write_summary(out: Path) -> str:
    """Draw it, write it, return it."""
    text = "\n".join(lines(out))
    write_atomically(out / "summary.txt", text + "\n")
    write_atomically(out / "summary.md", f"# What `make gpu` measured\n\n```text\n{text}\n```\n")
    return text


def lines(out: Path) -> list[str]:
    files = {name: read(out / f"{name}.json") for name in PARTS}
    written = sorted((file for file in files.values() if "machine" in file), key=lambda file: file["written"])
    now = written[-1]["machine"] if written else {}
    # What was made of other sources, or on another device, is history: it is counted and left out.
    made, stale = {}, {}
    for name, file in files.items():
        measurements = file["measurements"]
        same = {key: m for key, m in measurements.items() if all(m["origin"].get(i) == now.get(i) for i in IDENTITY)}
        made[name], stale[name] = same, len(measurements) - len(same)
    table = [*_floor_table(made["floor"]), *targets(made)]
    verdicts = [mark for mark, _ in table if mark is not None]
    missed = verdicts.count("MISS")
    text = [*_head(now, stale), *_states(made), *_gemms(made["floor"]), *_rows(made["rows"])]
    text += [f"{mark or '':<5}{what}".rstrip() for mark, what in table]
    text += [f"decide {what}" for what in decisions(made["tuning"])]
    open_ones = [name for name in PARTS if not made[name]]
    passed = len(verdicts) - missed
    end = f"{passed} targets met, {missed} missed" if verdicts else "no target was measured"
    text.append(f"verdict: {end}" + (f"; not begun: {', '.join(open_ones)}" if open_ones else ""))
    return text


def _results(measurements: Mapping[str, Record]) -> dict[str, Any]:
    return {key: made["result"] for key, made in measurements.items() if made["status"] == "ok" and "result" in made}


# -- what there is ----------------------------------------------------------------------------------------------------


def _head(m: Record, stale: Mapping[str, int]) -> Iterator[str]:
    if not m:
        yield "nothing has been measured yet"
        return
    changed = {True: " with changes", False: "", None: ", changes unknown,"}[m["dirty"]]
    commit = "unknown" if m["commit"] is None else f"{m['commit'][:12]}{changed}"
    yield f"{m['gpu']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}"
    yield f"commit {commit} (from {m['commit_from']}), sources {m['sources']}"
    if m["stand_in"]:
        yield "A STAND-IN, NO GPU: the times and verdicts below mean nothing"
    elif m["tiny"]:
        yield "TINY SHAPES: the times and verdicts below mean nothing"
    old = [f"{count} of {name}" for name, count in stale.items() if count]
    if old:
        yield f"left out, as made of other sources or versions: {', '.join(old)}"


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
        else:
            inner = [
                (key, name, why)
                for key, made in measurements.items()
                for name, why in (made.get("result") or {}).get("failures", {}).items()
            ]
            if inner:
                key, name, why = inner[0]
                line += f"; {len(inner)} FAILED within, as {key}, {name}: {why}"
        yield line[:WIDTH]
    yield from _tests(made["right"])


def _tests(measurements: Mapping[str, Record]) -> Iterator[str]:
    for result in _results(measurements).values():
        first = next(iter(result["failures"]), None)
        tail = f"; first failure {first}" if first else ""
        counts = ", ".join(f"{result[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        yield f"tests      {counts}{tail}"[:WIDTH]


def _gemms(measurements: Mapping[str, Record]) -> Iterator[str]:
    """The ceiling that the shares are of, and where a step's time goes."""
    heads: dict[str, str] = {}
    for result in _results(measurements).values():
        if "gemm_tflops" in result:
            rates = "/".join(f"{rate:.0f}" for rate in result["gemm_tflops"].values())
            heads.setdefault(result["model"], rates)
    if heads:
        words = ", ".join(f"{model} {rates}" for model, rates in heads.items())
        yield f"TFLOP/s of the library's logits/dHidden/dWeight GEMMs: {words}"[:WIDTH]
    for key, result in _results(measurements).items():
        if "pieces" in result and result["rest_seconds"] is not None:
            pieces = {name: result["times"][name].get("median", 0.0) for name in result["pieces"]}
            words = ", ".join(f"{name.split()[0]} {seconds * 1e3:.1f}" for name, seconds in pieces.items())
            yield f"ms of a step, {key}: {words}, between them {result['rest_seconds'] * 1e3:.1f}"[:WIDTH]


def _rows(measurements: Mapping[str, Record]) -> Iterator[str]:
    """Row kernels as a share of a copy's speed: the first vocabulary's, and of the others the slowest."""
    found = _results(measurements)
    first = next(iter(found.values()))["vocab"] if found else None
    for key, result in found.items():
        if result["vocab"] == first:
            cells = []
            for kernel in ("statistics", "gradient", "objective"):
                numbers = result.get(kernel, {})
                cell = "failed"
                if "fraction" in numbers:
                    rate = f"{numbers['gigabytes_per_second']:.0f} GB/s, {_spread(numbers)}"
                    cell = f"{numbers['fraction']:.2f} ({rate})"
                cells.append(f"{kernel} {cell}")
            yield f"of a copy's speed, {key}: {', '.join(cells)}"[:WIDTH]
    others = [
        (result[kernel]["fraction"], f"{kernel} {key}")
        for key, result in found.items()
        for kernel in ("statistics", "gradient", "objective")
        if result["vocab"] != first and "fraction" in result.get(kernel, {})
    ]
    if others:
        yield f"of a copy's speed, other vocabularies: {min(others)[0]:.2f} ({min(others)[1]}) or more"


def _cell(step: Record) -> str:
    if "fraction" not in step:
        return "failed"
    return f"{step['fraction']:.3f} {step['median'] * 1e3:.1f}ms {_spread(step)}"


def _spread(times: Mapping[str, Any]) -> str:
    """Half of the distance from the fastest run to the slowest."""
    return f"+-{times['spread'] / 2:.0%}"


# -- verdicts ---------------------------------------------------------------------------------------------------------


def targets(made: Mapping[str, Mapping[str, Record]]) -> Iterator[tuple[str, str]]:
    """(PASS or MISS, what with its number)."""
    yield from _peer_targets(made["scenarios"])
    yield from _memory_targets(made["memory"])
    for result in _results(made["right"]).values():
        ran = result["passed"] + result["failed"]
        yield _mark(ran > 0 and result["failed"] == 0), f"tests: {result['failed']} of {ran} failed"


def _mark(met: bool) -> str:
    return "PASS" if met else "MISS"


def _role(result: Record) -> int | None:
    """The hidden size that the targets speak of; tiny heads are called after it."""
    hidden = result["hidden"]
    name = str(result["model"]).rpartition("-")[2]
    return hidden if hidden in FLOOR_TARGETS else int(name) if name.isdigit() and int(name) in FLOOR_TARGETS else None


def _floor_table(measurements: Mapping[str, Record]) -> Iterator[tuple[str | None, str]]:
    """(PASS, MISS or None, line): shares of the GEMM floor by head and scenario; columns are workspaces.

    The targets are the first backend's; of the others the full step is shown.
    """
    judged = set()
    for result in _results(measurements).values():
        if "steps" not in result:
            continue
        labels = list(dict.fromkeys(name.split(" at ")[1] for name in result["steps"]))
        if not judged:
            head = f"{'share of the GEMM floor of the same run':<45}" + "".join(f"{label:>21}" for label in labels)
            yield None, head + "  aims"
        role, head_shape = _role(result), (result["hidden"], result["vocab"])
        first = head_shape not in judged
        judged.add(head_shape)
        scenarios = dict.fromkeys(name.split(" at ")[0] for name in result["steps"])
        for scenario in scenarios if first else ("full",):
            steps = {label: result["steps"].get(f"{scenario} at {label}", {}) for label in labels}
            cells = [
                f"{step['fraction']:.3f} {step['median'] * 1e3:.1f}ms {_spread(step)}"
                if "fraction" in step
                else "failed"
                for step in steps.values()
            ]
            aim = None if scenario == "half" or role is None else FLOOR_TARGETS[role]
            aim = NO_GRAD_TARGET if scenario == "no_grad" else aim
            aims = {label: aim - ALLOWANCE.get(label, 0.0) for label in labels} if aim is not None and first else {}
            met = all(steps[label].get("fraction", 0.0) >= least for label, least in aims.items())
            name = f"{result['model']} {result['backend']} {scenario}"
            line = f"{name:<40}" + "".join(f"{cell:>21}" for cell in cells)
            yield _mark(met) if aims else None, line + ("  " + " ".join(f"{least:.2f}" for least in aims.values()))
        half, full = (result["steps"].get(f"{name} at {labels[0]}", {}).get("median") for name in ("half", "full"))
        if half and full and first:
            words = f"{half / full:.2f} of the dense time (<= {HALF_TARGET})"
            yield _mark(half / full <= HALF_TARGET), f"{result['model']} half of the groups at zero advantage: {words}"


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
    """What the tuning says of the second stream and of tile rows; gains are shares of the time."""
    streams: dict[str, dict[str, float]] = {}
    tiles: dict[str, dict[str, float]] = {}
    for result in _results(measurements).values():
        where = f"H {result['hidden']} {result['scenario']}"
        steps = {tuple(name.split(", ")): numbers for name, numbers in result["steps"].items() if "median" in numbers}
        smallest = next((rows for _, rows, _ in steps), "")
        for (workspace, rows, stream), numbers in steps.items():
            budget = numbers["budget"]
            one, small = (steps.get(key) for key in ((workspace, rows, "one stream"), (workspace, smallest, stream)))
            if stream == "two streams" and one is not None and budget["num_buffers"] > 1:
                streams.setdefault(f"{workspace}, {rows}", {})[where] = 1 - numbers["median"] / one["median"]
            as_asked = budget["tile_rows"] == int(rows.split()[0])  # a small workspace has no room for large tiles
            if stream == "one stream" and rows != smallest and small is not None and as_asked:
                tiles.setdefault(f"{rows} at {workspace}", {})[where] = 1 - numbers["median"] / small["median"]
    if streams:
        best = max(streams, key=lambda name: _mean(streams[name]))
        yield f"second stream at {best}: {_gains(streams[best])}"
        keep = "keep" if _mean(streams[best]) >= STREAM_GAIN else "remove"
        yield f"second stream gains {_mean(streams[best]):.1%} at best ({best}): {keep} (keep from {STREAM_GAIN:.0%})"
    elif measurements:
        yield "second stream: no workspace had room for two buffers"
    for name, gains in tiles.items():
        mean = _mean(gains)
        choice = "take them" if mean >= TILE_GAIN else "do not" if mean <= -TILE_GAIN else "either"
        yield f"tiles of {name}: {_gains(gains)}: {choice}"


def _mean(gains: Mapping[str, float]) -> float:
    return sum(gains.values()) / len(gains)


def _gains(gains: Mapping[str, float]) -> str:
    return ", ".join(f"{where} {gain:+.1%}" for where, gain in gains.items())
