"""The tables of LongAct's options in README.md and docs/options.md; `python tests/test_options.py` writes them."""

from pathlib import Path

import pytest

from longact_kernels.sparse.config import fields

ROOT = Path(__file__).parent.parent
PLACES = [("README.md", False), ("docs/options.md", False), ("docs/options.md", True)]


def table(experimental: bool) -> str:
    rows = [f"| `{of.name}` | `{of.default!r}` | {of.metadata['help']} |" for of in fields(experimental)]
    return "\n".join(["| option of `LongAct` | default | meaning |", "|---|---|---|", *rows])


def marks(experimental: bool) -> tuple[str, str]:
    name = "experimental options" if experimental else "options"
    return f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"


@pytest.mark.parametrize(("page", "experimental"), PLACES)
def test_the_tables_are_those_of_the_config(page, experimental):
    begin, end = marks(experimental)
    assert begin + table(experimental) + end in (ROOT / page).read_text(), "run python tests/test_options.py"


if __name__ == "__main__":
    for page, experimental in PLACES:
        begin, end = marks(experimental)
        before, _, rest = (ROOT / page).read_text().partition(begin)
        (ROOT / page).write_text(before + begin + table(experimental) + end + rest.partition(end)[2])
