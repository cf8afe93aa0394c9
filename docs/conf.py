"""The documentation site, which `make docs` builds: Sphinx, the furo theme, Markdown by MyST."""

from fnmatch import fnmatch

from longact_kernels import __version__

project = "longact_kernels"
author = "the longact_kernels authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"longact_kernels {release}"
html_show_sphinx = False
html_show_copyright = False

# Links to headings, by the names that forges give them.
myst_heading_anchors = 4

# Docstrings are in Google style, and write code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True


def list_the_rest(app, docname, content):
    """Pages that index.md does not name stand at its end."""
    if docname == "index":
        named = ["index", *content[0].splitlines()]
        rest = sorted(page for page in app.env.found_docs if not any(fnmatch(page, name) for name in named))
        content[0] += "\n".join(["\n```{toctree}\n:caption: More", *rest, "```\n"]) if rest else ""


def setup(app):
    app.connect("source-read", list_the_rest)
