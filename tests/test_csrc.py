"""`csrc/`: its own C++ tests, plain and under sanitizers; `objective.h` against autograd.

Everything is compiled here, in temporary folders, with $CXX or g++; the installed extension is not used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo_fast.config import LOSS_TYPES, LossConfig
from grpo_fast.kernels import parameters
from grpo_fast.kernels.parameters import PARAMETERS
from grpo_fast.losses import LOSSES, Kernel, Segments
from grpo_fast.objectives import Tokens, importance_weight, kernel_objective, objective

CSRC = Path(__file__).resolve().parent.parent / "csrc"
TEST_SOURCES = ["tests/main.cpp", *sorted(f"tests/{path.name}" for path in (CSRC / "tests").glob("test_*.cpp"))]
SOURCES = ["group_cpu.cpp", "row_cpu.cpp", "sparse_cpu.cpp"]
STAND_IN = ["-DGRPO_FAST_STAND_IN_LIBRARY"]
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]


def run(command: list[str | Path], **kwargs) -> str:
    """What `command` prints; an assertion that shows it where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nexit code {done.returncode}\n{done.stdout[-8000:]}"
    return done.stdout


def load_module(name: str, path: Path) -> Any:
    """The module in a file, without taking the place of an installed one."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compiler() -> str:
    """The C++ compiler, or a skipped test that says so."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip(f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on PATH")
    return found


def require_flags(flags: list[str], folder: Path) -> None:
    """Skip, with the compiler's words, where an empty program cannot be built with `flags`."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    probe = subprocess.run([compiler(), *flags, source, "-o", folder / "probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"{compiler()} {' '.join(flags)}: {probe.stderr.strip()[-300:]}")


@pytest.mark.parametrize("flags", [["-O2"], SANITIZERS], ids=["plain", "sanitized"])
def test_cpp_tests_pass(flags: list[str], tmp_path: Path) -> None:
    require_flags([*flags, "-fopenmp"], tmp_path)
    program, library = tmp_path / "csrc_tests", tmp_path / "libtorch_cpu.so"
    exported = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so"]
    run([compiler(), *WARNINGS, "-O2", *exported, "tests/stand_in_torch.cpp", "-o", library], cwd=CSRC)
    options = [*WARNINGS, *flags, *STAND_IN, "-ffp-contract=off", "-fopenmp"]
    loaded = ["-Wl,--no-as-needed", library, f"-Wl,-rpath,{tmp_path}", "-ldl"]
    run([compiler(), *options, *TEST_SOURCES, *SOURCES, "gemm_cpu.cpp", *loaded, "-o", program], cwd=CSRC)
    output = run([program], cwd=tmp_path)
    declared = sum((CSRC / name).read_text().count("\nTEST(") for name in TEST_SOURCES)
    assert declared > 20
    assert f"{declared} tests, 0 failed checks" in output


def test_sources_need_no_openmp(tmp_path: Path) -> None:
    flags = [*WARNINGS, "-Wno-unknown-pragmas", "-fno-openmp", "-O0", "-fsyntax-only"]
    run([compiler(), *flags, *SOURCES], cwd=CSRC)


# -- objective.h against autograd -------------------------------------------------------------------------------------

TOKEN_LOCAL = [name for name in LOSS_TYPES if LOSSES[name].kernel is not None]
POLICIES = get_args(Kernel)
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
WEIGHTS = ("none", "weight", "token_truncate", "token_mask")


class Objective(ctypes.Structure):
    """The struct of objective.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("policy", "kl", "correction")),
        ("kl_times_ratio", ctypes.c_bool),
        *((name, ctypes.c_double) for name in PARAMETERS),
    ]

    @classmethod
    def of(cls, config: LossConfig, tokens: Tokens) -> Objective:
        given = kernel_objective(config, tokens)
        assert given is not None
        return cls(
            policy=POLICIES.index(given.policy),
            kl=KL_ESTIMATORS.index(given.kl),
            correction=WEIGHTS.index(given.correction),
            kl_times_ratio=given.kl_times_ratio,
            **dict(given.parameters),
        )


class Arrays(ctypes.Structure):
    """The struct of objective_abi.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance", "advantages"),
            *("terms", "slopes"),
        )
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("objective") / "objective_abi.so"
    run([compiler(), *WARNINGS, "-O2", "-shared", "-fPIC", "tests/objective_abi.cpp", "-o", path], cwd=CSRC)
    loaded = ctypes.CDLL(str(path))
    loaded.objective_size.restype = ctypes.c_int64
    assert loaded.objective_size() == ctypes.sizeof(Objective)
    return loaded


def compiled_objective(
    library: ctypes.CDLL, logprobs: Tensor, tokens: Tokens, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """(terms, their slopes), `[T]` each, by `token_term`."""
    given = {"logprobs": logprobs, "advantages": tokens.advantages, **tokens.optional(Tensor.contiguous)}
    terms, slopes = torch.empty_like(logprobs), torch.empty_like(logprobs)
    named = given | {"terms": terms, "slopes": slopes}
    pointers = {name: tensor.data_ptr() for name, tensor in named.items() if tensor is not None}
    function = library.objective_double if logprobs.dtype == torch.float64 else library.objective_float
    options = Objective.of(config, tokens)
    function(ctypes.byref(options), ctypes.c_int64(logprobs.numel()), ctypes.byref(Arrays(**pointers)))
    return terms, slopes


def autograd_objective(logprobs: Tensor, tokens: Tokens, config: LossConfig) -> tuple[Tensor, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    terms = objective(leaf, None, tokens, config).policy
    return terms.detach(), torch.autograd.grad(terms.sum(), leaf)[0]


@dataclass
class Data:
    """Random tokens with corners among them, float64 numbers that float32 holds."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    sampling: Tensor
    advantages: Tensor

    @staticmethod
    def make(num: int = 400) -> Data:
        gen = torch.Generator().manual_seed(7)

        def normal(scale: float) -> Tensor:
            return torch.randn(num, generator=gen) * scale

        logprobs, advantages = -normal(1.5).abs() - 0.01, normal(1.0)
        old, ref, sampling = logprobs + normal(0.4), logprobs + normal(0.5), logprobs + normal(0.6)
        old[:60] = logprobs[:60]  # the tie of every first step
        ref[20:80] = logprobs[20:80]
        sampling[40:100] = old[40:100]
        sampling[100:120] = torch.nan
        advantages[::7] = 0.0
        old[120:123] = logprobs[120:123] - torch.tensor([3.0, -3.0, 8.0])
        return Data(*(tensor.double() for tensor in (logprobs, old, ref, sampling, advantages)))

    def tokens(self, config: LossConfig, dtype: torch.dtype, *, has_old: bool, has_sampling: bool) -> Tokens:
        num = self.logprobs.numel()
        mask, segments = torch.ones(num, dtype=torch.bool), Segments(torch.tensor([0, 150, 151, num]), num)
        tokens = Tokens(
            advantages=self.advantages.to(dtype),
            mask=mask,
            segments=segments,
            bonus_count=mask.sum(),
            old_logprobs=self.old.to(dtype) if has_old else None,
            ref_logprobs=self.ref.to(dtype) if config.beta != 0 else None,
            sampling_logprobs=self.sampling.to(dtype) if has_sampling else None,
        )
        if tokens.old_logprobs is not None:  # as the loss does
            tokens.importance = importance_weight(tokens.old_logprobs, tokens, config)
        return tokens


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    error, scale = (actual - expected).double().norm(), expected.double().norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_same(library: ctypes.CDLL, logprobs: Tensor, tokens: Tokens, config: LossConfig, bound: float) -> None:
    terms, slopes = compiled_objective(library, logprobs, tokens, config)
    expected_terms, expected = autograd_objective(logprobs, tokens, config)
    for name, actual, wanted in (("terms", terms, expected_terms), ("slopes", slopes, expected)):
        error = rel_rms(actual, wanted)
        assert error <= bound, f"{name}: relative RMS error {error:.3e} > {bound:.0e}; {config}"
    # Ties and clipped tokens: exactly none, and none by accident.
    assert torch.equal(slopes == 0, expected == 0), config


KL = [
    {},
    *({"beta": 0.3, "kl_estimator": k, "use_bias_correction_kl": b} for k in KL_ESTIMATORS[1:] for b in (True, False)),
]
CORRECTIONS = [
    {},
    {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 1.5},
    {"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": None},
    {"importance_sampling_mode": "token_mask", "importance_sampling_clip_min": 0.7},
    {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 3.0},
]
EXTRAS = [
    {},
    {"delta": 1.4, "epsilon": 0.15, "epsilon_high": 0.28},
    {"delta": 1.0, "epsilon": 0.0, "epsilon_high": 0.0, "dual_clip": 1.0},  # every bound at the first step's ratio
    {"epsilon_high": 3.0, "dual_clip": 1.5, "dppo_threshold": 0.05, "sapo_temperature_pos": 2.0},
]


@pytest.mark.parametrize("loss_type", TOKEN_LOCAL)
def test_objective_is_autograds(loss_type: str, library: ctypes.CDLL) -> None:
    data, compared = Data.make(), 0
    length = {"max_completion_length": 200} if loss_type == "dr_grpo" else {}
    for kl, correction, extra in itertools.product(KL, CORRECTIONS, EXTRAS):
        config = LossConfig(**({"epsilon_high": 0.2} | kl | correction | extra | length), loss_type=loss_type)
        for has_old, has_sampling in itertools.product((True, False), repeat=2):
            if correction and not has_sampling:
                continue
            if not has_old and (config.importance_sampling_mode or "").startswith("sequence"):
                continue  # not token-local
            for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
                tokens = data.tokens(config, dtype, has_old=has_old, has_sampling=has_sampling)
                assert_same(library, data.logprobs.to(dtype), tokens, config, bound)
                compared += 1
    assert compared == 7 * 4 * 2 * (4 + 2 + 2 + 2 + 1)


@pytest.mark.parametrize("loss_type", TOKEN_LOCAL)
def test_overflow_is_autograds(loss_type: str, library: ctypes.CDLL) -> None:
    """What infinite ratios and lost log-probabilities become: the same infinities and NaNs, not silence."""
    infinity, nan = float("inf"), float("nan")
    length = {"max_completion_length": 200} if loss_type == "dr_grpo" else {}
    config = LossConfig(loss_type=loss_type, delta=4.0, epsilon_high=0.2, **length)
    logprobs, old = (
        torch.tensor(values).repeat_interleave(3)
        for values in ([-1.0, -200.0, -infinity, -infinity, nan, -1.0], [-200.0, -1.0, -1.0, -infinity, -1.0, nan])
    )
    advantages = torch.tensor([1.0, -1.0, 0.0]).repeat(6)
    num, mask = advantages.numel(), torch.ones(18, dtype=torch.bool)
    tokens = Tokens(advantages, mask, Segments(torch.tensor([0, num]), num), mask.sum(), old_logprobs=old)
    terms, slopes = compiled_objective(library, logprobs, tokens, config)
    expected_terms, expected = autograd_objective(logprobs, tokens, config)
    assert expected.isnan().any() or loss_type in ("reinforce", "rloo")
    torch.testing.assert_close(terms, expected_terms, equal_nan=True)
    torch.testing.assert_close(slopes, expected, equal_nan=True)


def test_the_list_of_parameters_is_current() -> None:
    assert parameters.HEADER.read_text() == parameters.header(), "run python kernels/parameters.py"


def test_devices_know_the_same_names() -> None:
    native = pytest.importorskip("grpo_fast._C", reason="the extension is not built")
    kernels = pytest.importorskip("grpo_fast.kernels.objective", reason="Triton is not installed")
    assert native.PARAMETERS == kernels.PARAMETERS == PARAMETERS
    known = {"policy": POLICIES, "kl": KL_ESTIMATORS, "correction": WEIGHTS}
    assert tuple(known.values()) == (tuple(kernels.POLICIES), kernels.KL_ESTIMATORS, kernels.CORRECTIONS)
    given = {"policy": "clipped", "kl": "none", "correction": "none", "kl_times_ratio": True}
    for option, names in known.items():
        for name in names:
            native.Objective(**(given | {option: name}), parameters=[0.0] * len(PARAMETERS))
        with pytest.raises(ValueError, match=f"{option}: expected one of {', '.join(names)}; got 'other'"):
            native.Objective(**(given | {option: "other"}), parameters=[0.0] * len(PARAMETERS))
    with pytest.raises(ValueError, match=f"parameters: expected {len(PARAMETERS)} numbers; got 1"):
        native.Objective(**given, parameters=[0.0])
