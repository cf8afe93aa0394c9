"""Python imports this at its start in the stages' processes: a plain checkout needs no installation.

Installed, `csrc_triton/` is `longact_kernels.csrc_triton`; in a checkout it lies beside the package.
"""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

NAME = "longact_kernels.csrc_triton"
FOLDER = Path(__file__).parents[3] / "csrc_triton"


class Checkout:
    """Finds the kernels in their folder of the checkout."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == NAME:
            return spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
        return None


sys.meta_path.insert(0, Checkout)
