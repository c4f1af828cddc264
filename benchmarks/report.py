"""Tables and charts of recorded benchmarks: python benchmarks/report.py results/*.json [--out DIR]

Writes report.md, time_vs_floor.png and, where growth was measured, growth.png. The records are those of `measure.py`.
Needs matplotlib for the charts, and nothing else of this repository.

Every time stands beside that of the GEMMs that the cheapest plan must do, run by torch. On a GPU these are the floor:
everyone multiplies by the same library. On a CPU they are a reference: better products beat them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OWN = "grpo-fast"
# What records say that are older than a contender's full name.
FULL_NAMES = {
    "cut-cross-entropy": "cut-cross-entropy (torch.compile)",
    "Liger fused": "Liger fused (not compiled)",
    "Liger fused (one chunk)": "Liger fused (one chunk, not compiled)",
}
COLOURS = (
    *("#1b7837", "#7fbf7b", "#4d4d4d", "#b2182b", "#f4a582", "#d6604d", "#2166ac", "#92c5de", "#053061", "#e08214"),
    *("#762a83", "#35978f", "#c51b7d", "#8c510a"),
)
AXES = {"tokens": "tokens T", "vocab": "vocabulary V", "active": "share of tokens with an advantage"}


def load(paths: Sequence[Path]) -> list[Record]:
    """The records in pytest-benchmark files, a later one taking the place of an earlier one of the same case.

    Raises:
        ValueError: no records, or records of more than one machine.
    """
    records: dict[tuple[str, Any], Record] = {}
    for path in paths:
        for bench in json.loads(path.read_text())["benchmarks"]:
            record = bench["extra_info"]
            if record.get("schema") == 1:
                records[record["case"]["name"], record.get("growth")] = _with_full_names(record)
    if not records:
        raise ValueError(f"paths: expected records of benchmarks/measure.py in {', '.join(map(str, paths))}; got none")
    machines = {machine_line(record) for record in records.values()}
    if len(machines) > 1:
        raise ValueError(f"paths: expected records of one machine and version; got {' / '.join(sorted(machines))}")
    return list(records.values())


def _with_full_names(record: Record) -> Record:
    """The record with names that say what was run: cut-cross-entropy's own kernels need a GPU, for example."""
    names = {c["name"] for c in record["contenders"]}
    for contender in record["contenders"]:
        full = FULL_NAMES.get(contender["name"])
        on_gpu = record["machine"]["device"] == "cuda" and contender["name"] == "cut-cross-entropy"
        if full is not None and full not in names and not on_gpu:
            contender["name"] = full
    return record


def yardstick(record: Record) -> str:
    """What the library GEMMs of a record are called: nobody can beat a floor."""
    return "floor" if record["machine"]["device"] == "cuda" else "reference"


def spread(record: Record, contender: Record) -> str:
    """A contender's time over that of the GEMMs: of its median, from that of its fastest run to that of its slowest."""
    floor = record["floor"]["median"]
    return f"{contender['median'] / floor:.2f} ({contender['min'] / floor:.2f} to {contender['max'] / floor:.2f})"


def machine_line(record: Record) -> str:
    """The machine in a line."""
    m = record["machine"]
    if m["device"] == "cuda":
        where = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, triton {m['packages'].get('triton')}"
    else:
        threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
        where = f"{m['cpu']} ({m['cpu_capability']}), {threads}, {m['memory_gib']} GiB"
    return f"{where}, torch {m['torch']}, Python {m['python']}"


# -- tables -----------------------------------------------------------------------------------------------------------


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 2}f}"


def headers(record: Record) -> tuple[str, ...]:
    ratio = f"x {yardstick(record)}"
    return ("contender", "median ms", "min to max", "n", ratio, "TFLOP/s", "peak MiB", "logprob err", "gradient err")


def rows(record: Record) -> list[tuple[str, ...]]:
    """The table of a case: the GEMMs, then who was timed from fast to slow, then who failed."""
    floor = record["floor"]
    gemms = floor["gemms"]
    table = [
        (
            f"{yardstick(record)} GEMMs ({' + '.join(gemms)})",
            _milliseconds(floor["median"]),
            f"{_milliseconds(sum(g['min'] for g in gemms.values()))} to "
            f"{_milliseconds(sum(g['max'] for g in gemms.values()))}",
            str(min(g["n"] for g in gemms.values())),
            "1.00",
            f"{record['case']['flops'] / floor['median'] / 1e12:.2f}",
            *[""] * 3,
        )
    ]
    for c in sorted(_timed(record), key=lambda c: c["median"]):
        peak = "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**20:.0f}"
        table.append(
            (
                _starred(c),
                _milliseconds(c["median"]),
                f"{_milliseconds(c['min'])} to {_milliseconds(c['max'])}",
                str(c["n"]) + ("+" if c["first_run_counted"] else ""),
                f"{c['floor_ratio']:.2f}",
                f"{c['tflops']:.2f}",
                peak,
                _error(c, "logprobs"),
                _error(c, "grad_hidden", "grad_weight"),
            )
        )
    table += [(c["name"], "failed", *[""] * 7) for c in record["contenders"] if c["status"] == "failed"]
    return table


def _timed(record: Record) -> list[Record]:
    return [c for c in record["contenders"] if c["status"] == "timed"]


def _starred(contender: Record) -> str:
    return contender["name"] + ("" if contender["entropy"] else " *")


def _error(contender: Record, *names: str) -> str:
    values = [contender["errors"][name] for name in names if name in contender["errors"]]
    return f"{max(values):.1e}" if values else ""


def reasons(record: Record) -> list[str]:
    """Why the others have no time."""
    return [f"{c['name']}: {c['status']} ({c['reason']})" for c in record["contenders"] if c["status"] != "timed"]


def text_table(record: Record) -> str:
    """The table for a terminal."""
    table = [headers(record), *rows(record)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [heading(record)]
    for row in table:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines + [f"  {reason}" for reason in reasons(record)])


def heading(record: Record) -> str:
    case = record["case"]
    cap = f", soft cap {case['softcap']:g}" if case["softcap"] else ""
    return (
        f"{case['model']}, {case['title']}: T {case['tokens']} ({case['active_tokens']} active), H {case['hidden']}, "
        f"V {case['vocab']}{cap}"
    )


def summary(records: Sequence[Record]) -> list[str]:
    """A row a case: this library against the GEMMs, the fastest competitors and its own full step.

    A competitor without entropies does less, so the fastest that has them stands beside the fastest of all. Where only
    some were timed, a + says that others, not timed there, were faster at the same head's full step.
    """
    full = {r["case"]["model"]: r for r in records if r["case"]["scenario"] == "full" and "growth" not in r}
    lines = [
        f"| case | {OWN} ms | x {yardstick(records[0])} (min to max) | peak MiB less gradients "
        "| fastest competitor with entropies | times slower | fastest of all | times slower | of full step |",
        "|---|---:|---:|---:|---|---:|---|---:|---:|",
    ]
    untimed: dict[str, None] = {}
    for record in records:
        case, timed = record["case"], {c["name"]: c for c in _timed(record)}
        if OWN not in timed or "growth" in record:
            continue
        own = timed[OWN]
        peak = "" if own["peak_bytes"] is None else f"{(own['peak_bytes'] - case['gradient_bytes']) / 2**20:.0f}"
        dense = {c["name"]: c for c in _timed(full[case["model"]])} if case["model"] in full else {}
        rivals = []
        for candidates in (_rivals(timed.values(), entropy=True), _rivals(timed.values())):
            fastest = min(candidates, key=lambda c: c["median"], default=None)
            if fastest is None:
                rivals += ["", ""]
                continue
            beaten_by = _faster(fastest["name"], dense, timed)
            untimed |= dict.fromkeys(beaten_by)
            rivals += [_starred(fastest) + " +" * bool(beaten_by), f"{fastest['median'] / own['median']:.2f}"]
        share = f"{own['median'] / dense[OWN]['median']:.2f}" if OWN in dense else ""
        title = f"{case['model']}, T {case['tokens']}, {case['title']}"
        cells = (title, _milliseconds(own["median"]), spread(record, own), peak, *rivals, share)
        lines.append(f"| {' | '.join(cells)} |")
    if untimed:
        lines += ["", f"+: faster at the same head's full step, and not timed here: {', '.join(untimed)}."]
    return lines if len(lines) > 2 else []


def _rivals(timed: Iterable[Record], *, entropy: bool = False) -> list[Record]:
    """Those of other packages, all or with entropies only."""
    return [c for c in timed if c["package"] != OWN and (c["entropy"] or not entropy)]


def _faster(name: str, full: Mapping[str, Record], timed: Mapping[str, Record]) -> list[str]:
    """Who has entropies, was not timed in a case, and was faster than `name` at the full step."""
    if name not in full:
        return []
    others = [c for c in _rivals(full.values(), entropy=True) if c["name"] not in timed]
    return [c["name"] for c in others if c["median"] < full[name]["median"]]


def markdown(records: Sequence[Record]) -> str:
    """The report: machine, how to read it, and a table a case."""
    first = records[0]
    commit, dirty = first["machine"]["commit"], first["machine"]["dirty"]
    name = yardstick(first)
    beatable = "" if name == "floor" else "; a reference and no floor: faster products than torch's go below 1"
    versions = ", ".join(f"{package} {version}" for package, version in first["machine"]["packages"].items())
    lines = [
        "# Benchmarks",
        "",
        f"{machine_line(first)}. {versions}. Commit {commit}{' with local changes' if dirty else ''}.",
        "",
        "bfloat16. Medians of n interleaved runs after a warm-up; those under 3 s each follow an untimed one (n+: a "
        "run above 20 s counts from the first). "
        f"x {name}: time over the sum of the medians of the GEMMs that the cheapest plan must do, by torch (bf16 in "
        f"and out, into ready memory), measured in the same rounds{beatable}. TFLOP/s counts that plan's FLOPs, "
        "whatever a contender really did. Peak: memory beyond the "
        f"inputs, gradients included ({first['memory_method'] or 'not measurable here'}). Errors against float64: "
        "log-probabilities in nats (RMS), the worse of the two gradients (relative RMS). *: computes no entropy, so it "
        "does less than the others.",
        "",
        *summary(records),
    ]
    for record in records:
        case = record["case"]
        lines += [
            "",
            f"## {heading(record)}",
            "",
            f"| {' | '.join(headers(record))} |",
            "|---" + "|---:" * (len(headers(record)) - 1) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in rows(record)]
        if record["machine"]["device"] == "cuda":
            lines += ["", f"Compulsory DRAM traffic (computed): {case['compulsory_bytes'] / 2**30:.2f} GiB."]
        lines += ["", f"Gradients returned: {case['gradient_bytes'] / 2**20:.0f} MiB."]
        lines += [f"- {reason}" for reason in reasons(record)]
    return "\n".join(lines) + "\n"


# -- charts -----------------------------------------------------------------------------------------------------------


def _colours(records: Sequence[Record]) -> dict[str, str]:
    names = list(dict.fromkeys(c["name"] for record in records for c in record["contenders"]))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def plot_time_vs_floor(records: list[Record], path: Path, colours: dict[str, str]) -> None:
    """One panel a case: each contender's time over that of the GEMMs, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name = f"{yardstick(records[0])} GEMMs"
    records = sorted(records, key=lambda record: -len(_timed(record)))  # panels of one height side by side
    columns = 1 if len(records) == 1 else 2
    lines = [records[i : i + columns] for i in range(0, len(records), columns)]
    heights = [max(len(_timed(record)) for record in line) + 2.5 for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(7.5 * columns, 0.32 * sum(heights) + 0.9),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    longest = max(c["max"] / record["floor"]["median"] for record in records for c in _timed(record))
    for axes, record in zip(grid.flat, [*records, *[None] * (grid.size - len(records))], strict=True):
        if record is None:
            axes.axis("off")
            continue
        floor = record["floor"]["median"]
        timed = sorted(_timed(record), key=lambda c: -c["median"])
        for y, c in enumerate(timed):
            axes.barh(y, c["floor_ratio"], color=colours[c["name"]], height=0.7)
            axes.plot([c["min"] / floor, c["max"] / floor], [y, y], color="black", linewidth=1)
            label = f" {c['floor_ratio']:.2f}x, {_milliseconds(c['median'])} ms"
            axes.text(max(c["max"] / floor, 1.0), y, label, va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(timed)), [_starred(c) for c in timed], fontsize=8)
        tallest = heights[records.index(record) // columns] - 2.5
        axes.set_ylim(len(timed) - tallest - 0.5, len(timed) - 0.5)  # bars of one thickness, from the top
        axes.set_xscale("log")
        axes.set_xlim(0.5, longest * 4)
        _plain_log_ticks(axes.xaxis)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"{heading(record)}\n{name} {_milliseconds(floor)} ms", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(f"time / {name} of the same run (log scale; lines: min to max; *: no entropy)", fontsize=8)
    figure.suptitle(machine_line(records[0]), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _series(records: Sequence[Record], axis: str) -> dict[str, list[tuple[float, Record, Record]]]:
    """contender: [(x, contender's result, record)], ordered, of the points that it was timed at."""
    series: dict[str, list[tuple[float, Record, Record]]] = {}
    for record in records:
        if record.get("growth") == axis:
            case = record["case"]
            x = case["active_tokens"] / case["tokens"] if axis == "active" else case[axis]
            for c in _timed(record):
                series.setdefault(c["name"], []).append((x, c, record))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def plot_growth(records: Sequence[Record], path: Path, colours: dict[str, str]) -> None:
    """Time and peak memory against T and V, and time against the active share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    panels = [
        (grid[0][0], "tokens", "time"),
        (grid[1][0], "tokens", "memory"),
        (grid[0][1], "vocab", "time"),
        (grid[1][1], "vocab", "memory"),
        (grid[0][2], "active", "time"),
    ]
    for axes, axis, kind in panels:
        series = _series(records, axis)
        for name, points in series.items():
            xs = [x for x, _, _ in points]
            if kind == "time":
                ys = [c["median"] for _, c, _ in points]
                axes.fill_between(
                    xs,
                    [c["min"] for _, c, _ in points],
                    [c["max"] for _, c, _ in points],
                    color=colours[name],
                    alpha=0.2,
                )
            else:
                ys = [math.nan if c["peak_bytes"] is None else c["peak_bytes"] / 2**30 for _, c, _ in points]
            axes.plot(xs, ys, marker="o", markersize=4, color=colours[name], label=name)
        own = [r for r in records if r.get("growth") == axis]
        if kind == "time" and own:
            floor = sorted((x, r["floor"]["median"]) for points in series.values() for x, _, r in points)
            axes.plot(
                *zip(*floor, strict=True),
                color="black",
                linestyle="--",
                linewidth=1,
                label=f"{yardstick(own[0])} GEMMs",
            )
        _label(axes, axis, kind, own)
    labelled: dict[str, Any] = {}
    for axes, _, _ in panels:
        labelled |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[1][2].axis("off")
    grid[1][2].legend(labelled.values(), labelled.keys(), loc="center", frameon=False)
    figure.suptitle(machine_line(records[0]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(axes: Any, axis: str, kind: str, records: Sequence[Record]) -> None:
    """Titles, units and scales of a growth panel."""
    if not records:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    case = records[0]["case"]
    fixed = {"tokens": f"V {case['vocab']}", "vocab": f"T {case['tokens']}"}
    fixed["active"] = f"T {case['tokens']}, V {case['vocab']}"
    axes.set_title(f"{'time' if kind == 'time' else 'peak memory'}, H {case['hidden']}, {fixed[axis]}", fontsize=10)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("seconds, forward + backward" if kind == "time" else "GiB beyond the inputs, gradients included")
    axes.grid(alpha=0.3)
    if axis == "active":
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.05)
        return
    ticks = sorted({r["case"][axis] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
    axes.minorticks_off()
    _plain_log_ticks(axes.yaxis)


def _plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10 ... as plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# -- command line -----------------------------------------------------------------------------------------------------


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of some JSON files into a directory; returns what was written."""
    records = load(paths)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.md"]
    written[0].write_text(markdown(records))
    colours = _colours(sorted(records, key=lambda record: "growth" in record))
    steps = [record for record in records if "growth" not in record and _timed(record)]
    growth = [record for record in records if "growth" in record]
    if steps:
        plot_time_vs_floor(steps, out / "time_vs_floor.png", colours)
        written.append(out / "time_vs_floor.png")
    if growth:
        plot_growth(growth, out / "growth.png", colours)
        written.append(out / "growth.png")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, help="directory (default: that of the first file)")
    options = parser.parse_args(arguments)
    for path in write(options.paths, options.out or options.paths[0].parent):
        print(path)


if __name__ == "__main__":
    main()
