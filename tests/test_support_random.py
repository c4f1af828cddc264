"""Random whole configurations on supports: the settings of tests/test_random.py, and rows of every kind.

    pytest tests/test_support_random.py --random-cases 2000 --random-seed 7       --random-case N for one again

Which supports a case has is drawn by a generator of its own: the cases of tests/test_random.py stay as
they are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import test_random
from tests.cases import BACKENDS, INTERPRETED
from tests.random_cases import Draw, Settings, build, draw_settings, legal_plans
from tests.supports import MIXTURES, SHARE, sparse_share

NUM_CASES = 12 if INTERPRETED else 160


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    count = NUM_CASES if option("--random-cases") is None else option("--random-cases")
    first = test_random.SEED_STRIDE * option("--random-seed")
    if "case_number" in metafunc.fixturenames:
        metafunc.parametrize("case_number", option("--random-case") or range(first, first + count))


def with_support(settings: Settings) -> Settings:
    """The same case on a support; what a call without a head leaves out becomes a loss, what is resident is not."""
    d = Draw(f"support {settings.number}")
    settings = replace(settings, support=d.pick("mixed", *MIXTURES, usual=0.5), poison=None)
    if settings.call == "policy_loss":
        settings = replace(settings, call="grpo_loss", grads=("hidden", "weight"))
    plans = legal_plans(settings)
    return settings if settings.plan in plans else replace(settings, plan=d.choice(plans))


def test_random_case_on_a_support(case_number: int, pytestconfig: pytest.Config) -> None:
    devices = (pytestconfig.getoption("--random-device") or test_random.DEVICES).split(",")
    settings = with_support(draw_settings(case_number, BACKENDS, devices))
    share = Draw(f"share {case_number}").pick(SHARE, 1, 1000, usual=0.5)  # some rows, every one, none is sparse
    try:
        with test_random.device_of(settings), sparse_share(share, settings.served_by):
            test_random.CHECKS[settings.call](build(settings))
    except Exception as error:
        line = f"pytest tests/test_support_random.py --random-case {case_number}"
        raise AssertionError(f"{error}\n{settings}\nlimit V / {share}\nrepeat: {line}") from error
