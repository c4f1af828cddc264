"""The mutants of tests/mutants.py still apply to the sources; `python tests/mutants.py` says that each is seen."""

from __future__ import annotations

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_applies(mutant: mutants.Mutant) -> None:
    assert mutants.obstacle(mutant) is None
    assert mutant.before != mutant.after


def test_names_are_distinct() -> None:
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
