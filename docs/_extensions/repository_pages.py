"""Pages whose source lies elsewhere in the repository, or is not written yet.

Links in `docs` are those of the repository, so that they lead somewhere when read there. In the site, results
of benchmarks are pages of `results`, and what points to the study is left out as long as it has no document.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx


RESULT = re.compile(r"\]\((?:\.\./)+benchmarks/results/(\w+\.md)\)")
STUDY_LINK = re.compile(r"\[([^\]]+)\]\(study\.md\)")


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    text = RESULT.sub(r"](/results/\1)", source[0])
    if not (Path(app.srcdir) / "study.md").is_file():
        text = STUDY_LINK.sub(r"\1", text).replace("\nstudy\n", "\n")
    source[0] = text


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
