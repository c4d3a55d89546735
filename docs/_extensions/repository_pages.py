"""Pages whose source lies elsewhere in the repository, or is not written yet.

Links in `docs` are those of the repository, so that they lead somewhere when read there. In the site, results of
benchmarks are pages of `results`, other Markdown files outside `docs` are downloads, and links to folders and to a
study that has no document yet are plain text.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx


RESULT = re.compile(r"\]\((?:\.\./)+benchmarks/results/(\w+\.md)\)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")
STUDIES = ("study", "study-gpu")


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    folder = Path(app.srcdir, docname).parent
    missing = {f"{name}.md" for name in STUDIES if not Path(app.srcdir, f"{name}.md").is_file()}

    def in_the_site(match: re.Match) -> str:
        if match[2] in missing or (folder / match[2]).is_dir():
            return match[1]
        outside = match[2].startswith("../") and match[2].endswith(".md")
        return f"[{match[1]}](path:{match[2]})" if outside and folder == Path(app.srcdir) else match[0]

    text = LINK.sub(in_the_site, RESULT.sub(r"](/results/\1)", source[0]))
    for name in missing:
        text = text.replace(f"\n{Path(name).stem}\n", "\n")
    source[0] = text


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
