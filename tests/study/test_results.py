"""The study that is published: its document is what its records say."""

import json
import re
import runpy
import shutil

import pytest

from maetok_hf.study.presets import PRESETS
from tests.study.small import ROOT


DOCUMENTS = {preset.document: name for name, preset in PRESETS.items()}
PUBLISHED = sorted(path.name for path in (ROOT / "docs").glob("study*.md"))


def test_published_documents_are_of_presets():
    assert set(PUBLISHED) <= DOCUMENTS.keys()


def test_published_documents_follow_from_their_records(tmp_path):
    """Whatever of them there is, byte for byte, with every record used and every link leading somewhere."""
    main = runpy.run_path(str(ROOT / "examples" / "study_latents.py"))["main"]
    for name in PUBLISHED:
        preset, docs = DOCUMENTS[name], tmp_path / name / "docs"
        docs.mkdir(parents=True)
        shutil.copy(ROOT / "docs" / name, docs / name)
        shutil.copytree(ROOT / "docs" / "study" / "cells", docs / "study" / "cells")
        words = ["--preset", preset, "--results_dir", str(docs), "--output_dir", str(tmp_path / name / "outputs")]
        main([*words, "--report_only"])
        text = (docs / name).read_text(encoding="utf-8")
        assert text == (ROOT / "docs" / name).read_text(encoding="utf-8"), name
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / "docs" / target).exists(), f"{name} leads to {target}"
        minutes = 0.0
        for path in docs.glob(f"study/cells/{preset}-*-seed*.json"):
            minutes += sum(json.loads(path.read_text())["seconds"].values()) / 60
        found = float(re.search(r"^- time: (\d+) minutes", text, re.MULTILINE)[1])
        assert found == pytest.approx(minutes, abs=0.51), "a record is of other settings than those of now"
