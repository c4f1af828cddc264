"""Everything that a GPU should show of this library, in parts that go on where they stopped: `make gpu`.

    make gpu                           every part, the most telling first; again: what is left
    make gpu PART=floor                one part, or several: PART=floor,rows
    make gpu ARGS="--budget 540"       stop cleanly before nine minutes are over; again: go on
    make gpu ARGS=--again              measure what has been measured already (--retry: only what failed)
    python -m benchmarks.gpu --stand-in --tiny --out DIR      the same code on a machine without a GPU, in a minute

| part | what it leaves behind |
|---|---|
| `build` | the extensions, built in place with the compilers that are there; what this Python can import |
| `run` | `grpo-fast doctor`; one bf16 step of several chunks, fp16 and fp32 steps, against float64 |
| `floor` | the step against the library GEMMs, by head, scenario and workspace; the GEMMs in tiles; parts of the step |
| `rows` | the row kernels against device-to-device copies of equal bytes |
| `right` | `pytest -m gpu`, test by test |
| `tuning` | the second stream on and off, 512 and 1024 rows a tile, 1, 2.5 and 6 GiB |
| `scenarios` | every scenario of benchmarks/cases.py beside the competitors |
| `memory` | the allocator's peak against the workspace cap, by plan |
| `sanitizers` | compute-sanitizer: memcheck, racecheck, synccheck |
| `demo` | the trainer, a few steps |

A part is a list of measurements. Each is written to `benchmarks/results/<device>/<part>.json` as soon as it is finished
(store.py has the format), so that a killed run loses one. A measurement is done when it was made of the same sources,
on the same device, driver, torch and triton; otherwise it is made again. A part runs in a process of its own: an
illegal access ends that process, is written down, and the next measurement gets a new one. summary.py draws the table
and the verdicts from the files alone. Nothing here needs a network.
"""
