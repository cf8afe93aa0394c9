"""The documentation site, which `make docs` builds: Sphinx, the furo theme, Markdown by MyST."""

from longact_kernels import __version__

project = "longact_kernels"
author = "the longact_kernels authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = f"longact_kernels {release}"
html_show_sphinx = False

# Links to headings, by the names that forges give them.
myst_heading_anchors = 4

# Docstrings are in Google style, and write code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
