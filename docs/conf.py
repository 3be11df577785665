"""Sphinx settings: the pages are the repository's own Markdown files."""

project = "longattn"
author = "longattn contributors"
copyright = "2026, longattn contributors"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# Links to folders and source files are for readers of the repository; they have no page here.
suppress_warnings = ["myst.xref_missing"]
html_theme = "alabaster"
