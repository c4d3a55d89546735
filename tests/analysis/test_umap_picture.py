"""The subsample of the picture, and its reproduction."""

import json
from pathlib import Path

import pytest
import torch

from maetok_hf.analysis.run import run_analysis
from maetok_hf.analysis.umap_picture import choose_rows


LABELS = torch.arange(200) % 20


def test_images_are_drawn_from_some_classes(make_options):
    settings = {"parts": ["umap"], "umap_num_images": 30, "umap_num_classes": 4, "umap_num_neighbors": 5}
    options = make_options(**settings)
    rows = choose_rows(LABELS, options)
    assert len(rows) == 30 and len(LABELS[rows].unique()) == 4 and (rows.diff() > 0).all()
    assert torch.equal(rows, choose_rows(LABELS, options))
    other = choose_rows(LABELS, make_options(**settings, seed=1))
    assert not torch.equal(rows, other)


def test_classes_of_the_picture_do_not_depend_on_the_order_of_rows(make_options):
    options = make_options(parts=["umap"], umap_num_classes=4, umap_num_neighbors=5)
    rows, turned = choose_rows(LABELS, options), choose_rows(LABELS.flip(0), options)
    assert torch.equal(LABELS[rows].unique(), LABELS.flip(0)[turned].unique())
    assert len(rows) == len(turned) == 40


def test_too_few_images_of_the_classes_are_refused(make_options):
    with pytest.raises(ValueError, match="`umap_num_neighbors` is 10, but the picture has 10 images"):
        choose_rows(LABELS, make_options(parts=["umap"], umap_num_classes=1, umap_num_neighbors=10))


@pytest.mark.slow
def test_the_picture_is_the_same_again_and_tells_what_it_shows(make_options, tmp_path):
    pytest.importorskip("umap")
    settings = {"parts": ["umap"], "umap_num_neighbors": 5, "umap_num_images": 30, "umap_num_classes": 2}
    one, other = (make_options(**settings, output_dir=str(tmp_path / name)) for name in ("one", "other"))
    assert run_analysis(one) == run_analysis(other)
    assert (tmp_path / "one" / "umap.png").read_bytes() == (tmp_path / "other" / "umap.png").read_bytes()
    shown = json.loads((tmp_path / "one" / "analysis.json").read_text())["tokenizers"]["wide"]["umap"]
    assert shown["num_images"] == 30 and len(shown["classes"]) == 2
    assert "30 training latents of 2 classes" in Path(tmp_path / "one" / "analysis.md").read_text()
