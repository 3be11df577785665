"""Sphinx settings. What pages are made of besides their own text is in `tools/pages`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "longattn"
author = "longattn contributors"
copyright = "2026, longattn contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "tools.pages.extension"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_fence_as_directive = ["eval-rst"]

# Docstrings name code in single backticks.
default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "longattn"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
