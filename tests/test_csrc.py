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
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.config import LOSS_TYPES, LossConfig
from grpo_fast.inputs import TokenInputs
from grpo_fast.metrics import collect_metrics
from grpo_fast.objectives import Terms, Tokens, importance_weight, objective
from grpo_fast.packing import Segments

CSRC = Path(__file__).resolve().parent.parent / "csrc"
TEST_SOURCES = ["tests/main.cpp", *sorted(f"tests/{path.name}" for path in (CSRC / "tests").glob("test_*.cpp"))]
SOURCES = ["group_cpu.cpp", "row_cpu.cpp"]
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

TOKEN_LOCAL = [name for name in LOSS_TYPES if name not in ("vespo", "gmpo")]
POLICY_TERMS = {"cispo": 1, "sapo": 2, "dppo": 3, "ppo_dual": 4, "reinforce": 5, "rloo": 5}  # else 0, clipped
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
CLIPPED_LOW, CLIPPED_HIGH, CISPO_CLIPPED = 1, 2, 4
OUTPUTS = ("terms", "d_logprobs", "ratios", "clip_ratios", "kls", "importances")


class ObjectiveConfig(ctypes.Structure):
    """The struct of objective.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("policy", "kl", "correction")),
        ("kl_times_ratio", ctypes.c_bool),
        *(
            (name, ctypes.c_double)
            for name in (
                "epsilon_low epsilon_high delta beta importance_min importance_max sapo_temperature_pos "
                "sapo_temperature_neg dppo_threshold dppo_log_ratio_coef dual_clip"
            ).split()
        ),
    ]


class Arrays(ctypes.Structure):
    """The struct of objective_abi.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance", "advantages"),
            *OUTPUTS,
        )
    ]


def struct_config(config: LossConfig, *, known_weight: bool) -> ObjectiveConfig:
    """`config` as the device code takes it."""
    infinity = float("inf")
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    mode = config.importance_sampling_mode
    return ObjectiveConfig(
        policy=POLICY_TERMS.get(config.loss_type, 0),
        kl=KL_ESTIMATORS[config.kl_estimator] if config.beta != 0 else 0,
        correction=0 if mode is None else 1 if known_weight else {"token_truncate": 2, "token_mask": 3}[mode],
        kl_times_ratio=config.use_bias_correction_kl,
        epsilon_low=config.epsilon,
        epsilon_high=config.upper_epsilon,
        delta=infinity if config.delta is None else config.delta,
        beta=config.beta,
        importance_min=-infinity if low is None else low,
        importance_max=infinity if high is None else high,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        dppo_threshold=config.dppo_threshold,
        dppo_log_ratio_coef=config.dppo_log_ratio_coef,
        dual_clip=config.dual_clip,
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("objective") / "objective_abi.so"
    run([compiler(), *WARNINGS, "-O2", "-shared", "-fPIC", "tests/objective_abi.cpp", "-o", path], cwd=CSRC)
    loaded = ctypes.CDLL(str(path))
    loaded.objective_config_size.restype = ctypes.c_int64
    assert loaded.objective_config_size() == ctypes.sizeof(ObjectiveConfig)
    return loaded


def compiled_objective(
    library: ctypes.CDLL, logprobs: Tensor, tokens: Tokens, config: LossConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs of `token_objective` by name, and its flags, `[T]` each."""
    given = {"logprobs": logprobs, "advantages": tokens.advantages, **tokens.optional(Tensor.contiguous)}
    out = {name: torch.empty_like(logprobs) for name in OUTPUTS}
    pointers = {name: tensor.data_ptr() for name, tensor in (given | out).items() if tensor is not None}
    flags = torch.zeros(logprobs.numel(), dtype=torch.int32)
    function = library.objective_double if logprobs.dtype == torch.float64 else library.objective_float
    options = struct_config(config, known_weight=tokens.importance is not None)
    num, flag_pointer = ctypes.c_int64(logprobs.numel()), ctypes.c_void_p(flags.data_ptr())
    function(ctypes.byref(options), num, ctypes.byref(Arrays(**pointers)), flag_pointer)
    return out, flags


def autograd_objective(logprobs: Tensor, tokens: Tokens, config: LossConfig) -> tuple[Terms, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    terms = objective(leaf, None, tokens, config)
    (d_logprobs,) = torch.autograd.grad(terms.policy.sum(), leaf)
    return terms, d_logprobs


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
    out, flags = compiled_objective(library, logprobs, tokens, config)
    terms, d_logprobs = autograd_objective(logprobs, tokens, config)
    weight = torch.ones_like(logprobs) if terms.importance is None else terms.importance
    kl = torch.zeros_like(logprobs) if terms.kl is None else terms.kl
    expected = (terms.policy.detach(), d_logprobs, terms.ratio, terms.clip_ratio, kl, weight)
    for (name, actual), wanted in zip(out.items(), expected, strict=True):
        error = rel_rms(actual, wanted)
        assert error <= bound, f"{name}: relative RMS error {error:.3e} > {bound:.0e}; {config}"
    # Ties and clipped tokens: exactly none, and none by accident.
    assert torch.equal(out["d_logprobs"] == 0, d_logprobs == 0), config
    inputs = TokenInputs(tokens, torch.ones_like(logprobs), None, token_advantages=True, normalizer_given=True)
    metrics = collect_metrics(logprobs, None, terms, tokens, inputs, config).as_dict()
    num = logprobs.numel()
    counted = {}
    if config.record.clip == "two_sided":
        counted = {"low": CLIPPED_LOW, "high": CLIPPED_HIGH, "region": CLIPPED_LOW | CLIPPED_HIGH}
    for name, bits in counted.items():
        assert int((flags & bits != 0).sum()) == round(metrics[f"clip_ratio/{name}_mean"] * num), (name, config)
    if config.record.clip == "upper":
        assert int((flags & CISPO_CLIPPED != 0).sum()) == round(metrics["cispo_clip_ratio"] * num), config


KL = [
    {},
    *({"beta": 0.3, "kl_estimator": k, "use_bias_correction_kl": b} for k in KL_ESTIMATORS for b in (True, False)),
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
    out, _ = compiled_objective(library, logprobs, tokens, config)
    terms, d_logprobs = autograd_objective(logprobs, tokens, config)
    assert d_logprobs.isnan().any() or loss_type in ("reinforce", "rloo")
    torch.testing.assert_close(out["terms"], terms.policy.detach(), equal_nan=True)
    torch.testing.assert_close(out["d_logprobs"], d_logprobs, equal_nan=True)
