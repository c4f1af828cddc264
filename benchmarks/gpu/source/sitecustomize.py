"""Lets `grpo_fast` be imported from a checkout that is not installed: on PYTHONPATH, for `make gpu` and what it starts.

`kernels/` and `recipes/` lie at the top of the checkout and belong inside the package. Where the package is installed,
its own way of finding them comes first. A `sitecustomize` that this one hides is run afterwards.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


class _Rooms:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, room = name.partition(".")
        if package != "grpo_fast" or room not in ("kernels", "recipes"):
            return None
        folder = ROOT / room
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_Rooms)
_hidden = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry or ".").resolve() != HERE])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
