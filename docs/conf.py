"""How `make docs` builds the documentation."""

import importlib.metadata
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "maetok_hf"
author = "The maetok_hf maintainers"
release = importlib.metadata.version("maetok_hf")
extensions = ["sphinx.ext.autodoc", "myst_parser", "markdown_docstrings", "repository_pages"]
exclude_patterns = ["study/cells"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "maetok_hf"
html_copy_source = False
html_show_sphinx = False
