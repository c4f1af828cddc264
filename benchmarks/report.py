"""Tables and charts of recorded benchmarks: python benchmarks/report.py results/*.json [--out DIR]

Writes report.md, time_vs_floor.png and, where growth was measured, growth.png and growth_support.png (`charts.py`). The
records are those of `measure.py`. Needs matplotlib for the charts, and nothing of this repository but these two files.

Every time stands beside that of the GEMMs that the cheapest plan must do, run by torch. On a GPU these are the floor:
everyone multiplies by the same library. On a CPU they are a reference: better products beat them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
REPO = Path(__file__).resolve().parent.parent
OWN = "grpo-fast"
# What records say that are older than a contender's full name.
FULL_NAMES = {
    "cut-cross-entropy": "cut-cross-entropy (torch.compile)",
    "Liger fused": "Liger fused (not compiled)",
    "Liger fused (one chunk)": "Liger fused (one chunk, not compiled)",
}
DENSE = "grpo-fast dense"  # the step without supports, in the same rounds


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


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 2}f}"


def headers(record: Record) -> tuple[str, ...]:
    ratio = f"x {yardstick(record)}"
    rate = "TFLOP/s" if supports(record) is None else "x dense"
    return ("contender", "median ms", "min to max", "n", ratio, rate, "peak MiB", "logprob err", "gradient err")


def supports(record: Record) -> Record | None:
    """What a record says of its rows' supports; None where it is older than they are, too."""
    return record.get("support")


def _rate(record: Record, seconds: float) -> str:
    """TFLOP/s; with supports, over the step without them, whose FLOPs are not what is done."""
    if supports(record) is None:
        return f"{record['case']['flops'] / seconds / 1e12:.2f}"
    dense = next((c["median"] for c in timed(record) if c["name"] == DENSE), None)
    return "" if dense is None else f"{seconds / dense:.3f}"


def rows(record: Record) -> list[tuple[str, ...]]:
    """The table of a case: the GEMMs, then who was timed from fast to slow, then who failed."""
    floor = record["floor"]
    gemms = floor["gemms"]
    table = [
        (
            f"{yardstick(record)} GEMMs ({' + '.join(gemms)})",
            milliseconds(floor["median"]),
            f"{milliseconds(sum(g['min'] for g in gemms.values()))} to "
            f"{milliseconds(sum(g['max'] for g in gemms.values()))}",
            str(min(g["n"] for g in gemms.values())),
            "1.00",
            _rate(record, floor["median"]),
            *[""] * 3,
        )
    ]
    for c in sorted(timed(record), key=lambda c: c["median"]):
        peak = "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**20:.0f}"
        table.append(
            (
                starred(c),
                milliseconds(c["median"]),
                f"{milliseconds(c['min'])} to {milliseconds(c['max'])}",
                str(c["n"]) + ("+" if c["first_run_counted"] else ""),
                f"{c['floor_ratio']:.2f}",
                _rate(record, c["median"]),
                peak,
                _error(c, "logprobs"),
                _error(c, "grad_hidden", "grad_weight"),
            )
        )
    table += [(c["name"], "failed", *[""] * 7) for c in record["contenders"] if c["status"] == "failed"]
    return table


def timed(record: Record) -> list[Record]:
    return [c for c in record["contenders"] if c["status"] == "timed"]


def starred(contender: Record) -> str:
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
    found = supports(record)
    lines += [] if found is None else [f"  {support_line(found)}"]
    return "\n".join(lines + [f"  {reason}" for reason in reasons(record)])


def heading(record: Record) -> str:
    case = record["case"]
    cap = f", soft cap {case['softcap']:g}" if case["softcap"] else ""
    return (
        f"{case['model']}, {case['title']}: T {case['tokens']} ({case['active_tokens']} active), H {case['hidden']}, "
        f"V {case['vocab']}{cap}"
    )


def support_line(found: Record) -> str:
    """What the supports of a record are."""
    shares = ", ".join(f"{share:.1%} {name}" for name, share in found["shares"].items() if share)
    return (
        f"Supports ({found['kind']}): mean {found['mean']:.1f}, median {found['median']:g}, largest {found['max']}; "
        f"{found['token_ids']} ids, {found['distinct_ids']} distinct; of the rows {shares} (sparse up to "
        f"{found['sparse_limit']} tokens)."
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
        case, by_name = record["case"], {c["name"]: c for c in timed(record)}
        if OWN not in by_name or "growth" in record:
            continue
        own = by_name[OWN]
        peak = "" if own["peak_bytes"] is None else f"{(own['peak_bytes'] - case['gradient_bytes']) / 2**20:.0f}"
        dense = {c["name"]: c for c in timed(full[case["model"]])} if case["model"] in full else {}
        full_step = dense.get(OWN)
        if supports(record) is not None:  # the same run's; and those not timed there mask nothing
            dense, full_step = {}, by_name.get(DENSE)
        rivals = []
        for candidates in (_rivals(by_name.values(), entropy=True), _rivals(by_name.values())):
            fastest = min(candidates, key=lambda c: c["median"], default=None)
            if fastest is None:
                rivals += ["", ""]
                continue
            beaten_by = _faster(fastest["name"], dense, by_name)
            untimed |= dict.fromkeys(beaten_by)
            rivals += [starred(fastest) + " +" * bool(beaten_by), f"{fastest['median'] / own['median']:.2f}"]
        digits = 2 if supports(record) is None else 3
        share = "" if full_step is None else f"{own['median'] / full_step['median']:.{digits}f}"
        title = f"{case['model']}, T {case['tokens']}, {case['title']}"
        cells = (title, milliseconds(own["median"]), spread(record, own), peak, *rivals, share)
        lines.append(f"| {' | '.join(cells)} |")
    if untimed:
        lines += ["", f"+: faster at the same head's full step, and not timed here: {', '.join(untimed)}."]
    return lines if len(lines) > 2 else []


def _rivals(candidates: Iterable[Record], *, entropy: bool = False) -> list[Record]:
    """Those of other packages, all or with entropies only."""
    return [c for c in candidates if c["package"] != OWN and (c["entropy"] or not entropy)]


def _faster(name: str, full: Mapping[str, Record], present: Mapping[str, Record]) -> list[str]:
    """Who has entropies, was not timed in a case, and was faster than `name` at the full step."""
    if name not in full:
        return []
    others = [c for c in _rivals(full.values(), entropy=True) if c["name"] not in present]
    return [c["name"] for c in others if c["median"] < full[name]["median"]]


def markdown(records: Sequence[Record]) -> str:
    """The report: machine, how to read it, and a table a case."""
    first = records[0]
    commit, dirty = first["machine"]["commit"], first["machine"]["dirty"]
    name = yardstick(first)
    beatable = "" if name == "floor" else "; a reference and no floor: faster products than torch's go below 1"
    dense = " With supports, x dense is over the step without them in the same rounds, whose GEMMs stand at the top."
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
        "does less than the others." + (dense if any(supports(record) is not None for record in records) else ""),
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
        found = supports(record)
        lines += [] if found is None else ["", support_line(found)]
        lines += [f"- {reason}" for reason in reasons(record)]
    return "\n".join(lines) + "\n"


# -- command line -----------------------------------------------------------------------------------------------------


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of some JSON files into a directory; returns what was written."""
    if str(REPO) not in sys.path:  # run as a script
        sys.path.append(str(REPO))
    from benchmarks import charts

    records = load(paths)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(markdown(records))
    return [out / "report.md", *charts.draw(records, out)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, help="directory (default: that of the first file)")
    options = parser.parse_args(arguments)
    for path in write(options.paths, options.out or options.paths[0].parent):
        print(path)


if __name__ == "__main__":
    main()
