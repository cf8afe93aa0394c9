"""The README as an index page shows it; all else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def on_an_index(readme: str, repository: str | None) -> str:
    """The README with links that lead somewhere from outside the repository; without one, they become plain text."""

    def link(found: re.Match) -> str:
        image, text, target = found.groups()
        if re.match(r"https?:|mailto:|#", target):
            return found[0]
        kind = "raw" if image else "blob"
        return f"{image}[{text}]({repository}/{kind}/main/{target})" if repository else text

    # The text of a link may be an image, as a badge is.
    pattern = r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)"
    return re.sub(pattern, link, readme)


project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    long_description=on_an_index((HERE / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository")),
    long_description_content_type="text/markdown",
)
