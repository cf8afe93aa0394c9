"""The tables of LongAct's options in docs/options.md; `python tests/test_options.py` writes them."""

from pathlib import Path

import pytest

from longact_kernels.sparse.config import fields

PAGE = Path(__file__).parent.parent / "docs" / "options.md"


def table(experimental: bool) -> str:
    rows = [f"| `{of.name}` | `{of.default!r}` | {of.metadata['help']} |" for of in fields(experimental)]
    return "\n".join(["| option of `LongAct` | default | meaning |", "|---|---|---|", *rows])


def marks(experimental: bool) -> tuple[str, str]:
    name = "experimental options" if experimental else "options"
    return f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"


@pytest.mark.parametrize("experimental", [False, True])
def test_the_tables_are_those_of_the_config(experimental):
    begin, end = marks(experimental)
    assert begin + table(experimental) + end in PAGE.read_text(), "run python tests/test_options.py"


if __name__ == "__main__":
    for experimental in (False, True):
        begin, end = marks(experimental)
        before, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(before + begin + table(experimental) + end + rest.partition(end)[2])
