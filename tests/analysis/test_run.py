"""Whole analyses: the same command gives the same numbers, however often it was stopped."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from maetok_hf.analysis import curve, run, subjects
from maetok_hf.analysis.options import AnalysisOptions
from maetok_hf.analysis.run import PartStore, check_packages, common_dimension, run_analysis
from maetok_hf.data import (
    HeldOutImages,
    LatentLayout,
    ShardWriter,
    describe_shards,
    open_images,
    read_shard,
    to_pixel_values,
)
from maetok_hf.training.checkpointing import data_identity
from maetok_hf.training.latent_encoding import encode_tokens, encoder_digest, load_tokenizer
from tests.analysis.conftest import CLASSES, NUM_HELD_OUT, NUM_TRAIN, write_images


def timeless(value):
    """Without what may differ between two machines."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def written(options):
    folder = Path(options.output_dir)
    return json.loads((folder / "analysis.json").read_text()), (folder / "analysis.md").read_text()


def pictures(options):
    return {path.name: path.read_bytes() for path in Path(options.output_dir).glob("*.png")}


def forbid(monkeypatch, module, *names):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{names} must not be called")

    for name in names:
        monkeypatch.setattr(module, name, refuse)


def count_calls(monkeypatch, module, name):
    function, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_the_same_command_gives_the_same_report_and_computes_nothing_again(make_options, monkeypatch):
    options = make_options()
    report = run_analysis(options)
    first, drawn = written(options), pictures(options)
    assert first[0] == json.loads(json.dumps(report))
    assert set(drawn) == {"mixtures.png", "probe.png", "spectrum.png"}
    forbid(monkeypatch, run, "fit_linear_probe", "mixture_curve", "channel_statistics", "moments_of")
    forbid(monkeypatch, subjects.EncodedImages, "blocks")
    run_analysis(options)
    assert written(options) == first and pictures(options) == drawn


def test_numbers_and_pictures_of_another_folder_are_the_same(make_options, tmp_path):
    one, other = make_options(), make_options(output_dir=str(tmp_path / "other"))
    assert timeless(run_analysis(one)) == timeless(run_analysis(other))
    assert pictures(one) == pictures(other)


def test_report_counts_images_and_hides_where_things_are(make_options, tmp_path):
    options = make_options()
    report, table = run_analysis(options), written(options)[1]
    for result in report["tokenizers"].values():
        assert result["latents"]["num_images"] == {"train": 3 * NUM_TRAIN, "held_out": 3 * NUM_HELD_OUT}
        assert 0 < result["probe"]["accuracy"] <= 1 and result["probe"]["top5_accuracy"] is None
        assert len(result["mixtures"]["cells"]) == 4
    assert f"{3 * NUM_TRAIN}, {3 * NUM_HELD_OUT}" in table and "| wide" in table and "![mixtures]" in table
    for path in Path(options.output_dir).rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert str(tmp_path) not in table


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (subjects.ViewEncoder, "__call__", 4),
        (subjects.ViewEncoder, "__call__", 12),
        (run, "fit_linear_probe", 2),
        (run, "fit_principal_components", 2),
        (curve, "fit_mixture", 3),
        (curve, "_reduced", 4),
        (run, "make_report", 1),
    ],
)
def test_a_run_that_fails_midway_continues_to_the_result_of_one_that_does_not(
    make_options, tmp_path, monkeypatch, owner, name, call
):
    monkeypatch.setattr(subjects, "BLOCK_ROWS", 10)
    whole = timeless(run_analysis(make_options(output_dir=str(tmp_path / "whole"))))
    function, calls = getattr(owner, name), []

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    options = make_options()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_once)
        with pytest.raises(KeyboardInterrupt):
            run_analysis(options)
    again = count_calls(monkeypatch, owner, name)
    assert timeless(run_analysis(options)) == whole
    total = {"__call__": 2 * (10 + 4), "fit_linear_probe": 2, "fit_mixture": 8}.get(name)
    if total is not None:  # what was done is not done again; of a block that was begun at most two batches
        assert len(again) <= total - (call - 1) + (2 if name == "__call__" else 0)


def test_another_setting_computes_only_what_depends_on_it(make_options, monkeypatch):
    run_analysis(make_options())
    forbid(monkeypatch, subjects.EncodedImages, "blocks")
    probes = count_calls(monkeypatch, run, "fit_linear_probe")
    mixtures = count_calls(monkeypatch, curve, "fit_mixture")
    statistics = count_calls(monkeypatch, run, "channel_statistics")
    run_analysis(make_options(probe_l2=1e-2))
    assert (len(probes), len(mixtures), len(statistics)) == (2, 0, 0)
    run_analysis(make_options(mixture_sizes=[2, 3, 4]))
    assert (len(probes), len(mixtures), len(statistics)) == (2, 4, 0)
    run_analysis(make_options(mixture_max_iterations=7))
    assert (len(probes), len(mixtures), len(statistics)) == (2, 12, 0)
    run_analysis(make_options(names=["one", "two"], probe_l2=1e-2))
    assert (len(probes), len(mixtures), len(statistics)) == (2, 12, 0)


def test_other_images_or_resolutions_are_encoded_anew(make_options, monkeypatch):
    run_analysis(make_options())
    calls = count_calls(monkeypatch, subjects.EncodedImages, "blocks")
    run_analysis(make_options(num_train_images=20))
    assert len(calls) == 4
    run_analysis(make_options(latents_dtype="float16"))
    assert len(calls) == 8


def test_without_kept_latents_the_numbers_stay(make_options, tmp_path, monkeypatch):
    options = make_options(keep_latents=False)
    kept = run_analysis(make_options(output_dir=str(tmp_path / "kept")))
    assert timeless(run_analysis(options)) == timeless(kept)
    assert not list(Path(options.output_dir).rglob("*.latents"))
    forbid(monkeypatch, subjects.EncodedImages, "blocks")
    assert timeless(run_analysis(options)) == timeless(kept)


def test_order_of_rows_and_numbering_of_classes_change_nothing(make_options, tmp_path):
    folder = tmp_path / "shuffled"
    # the other way round: the classes, and in each of them the images of the second half before those of the first
    for shade, name in enumerate(("z", "m", "a")):
        write_images(folder, "train", name, range(NUM_TRAIN // 2), shade, prefix="b")
        (folder / "train" / name).rename(folder / "half")
        write_images(folder, "train", name, range(NUM_TRAIN // 2, NUM_TRAIN), shade, prefix="a")
        for path in (folder / "half").iterdir():
            path.rename(folder / "train" / name / path.name)
        (folder / "half").rmdir()
        write_images(folder, "test", name, range(100, 100 + NUM_HELD_OUT), shade)
    parts = {"parts": ["statistics", "probe"], "batch_size": 1}
    one = run_analysis(make_options(**parts))
    other = run_analysis(make_options(**parts, dataset=str(folder), output_dir=str(tmp_path / "other")))
    for name, result in one["tokenizers"].items():
        shuffled = other["tokenizers"][name]
        assert result["probe"]["accuracy"] == shuffled["probe"]["accuracy"]
        assert result["probe"]["cross_entropy"] == pytest.approx(shuffled["probe"]["cross_entropy"], rel=1e-4)
        assert result["channels"]["std"] == pytest.approx(shuffled["channels"]["std"], rel=1e-9)
        assert result["spectrum"]["effective_rank"] == pytest.approx(shuffled["spectrum"]["effective_rank"], rel=1e-9)


def test_all_tokenizers_get_the_same_dimension_which_holds_the_variance_of_each(make_options):
    results = run_analysis(make_options())["tokenizers"].values()
    own = [result["spectrum"]["num_dimensions"] for result in results]
    given = [result["mixtures"]["data"]["num_dimensions"] for result in results]
    assert own[0] != own[1]
    assert given == [max(own)] * 2
    assert all(result["mixtures"]["data"]["explained_variance"] > 0.9 for result in results)


def test_common_dimension_has_a_limit_in_the_directions_there_are(make_options):
    spectra = [{"num_dimensions": 8, "num_directions": 20}, {"num_dimensions": 3, "num_directions": 5}]
    assert common_dimension(make_options(), spectra) == 5
    assert common_dimension(make_options(same_dimension=False), spectra) is None
    assert common_dimension(make_options(num_dimensions=4), spectra) == 4
    with pytest.raises(ValueError, match="`num_dimensions` is 6"):
        common_dimension(make_options(num_dimensions=6), spectra)


def write_cache(folder, images, tokenizer_folder, dtype="float32", split="train"):
    """What `cache_latents.py` writes, with mirror images that must not be read."""
    source = open_images(str(images), split=split, cache_dir=folder / "counts")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    batch = HeldOutImages(source, resolution=16, batch_size=5)
    layout = LatentLayout(source.num_rows, 6, 4, 2, dtype, split, rows_per_shard=20, class_names=CLASSES)
    stacked = batch.stacked()
    pixels = to_pixel_values(stacked["images"])
    latents = torch.cat([encode_tokens(tokenizer, part) for part in pixels.split(5)])
    views = torch.stack([latents, latents + 100]).to(getattr(torch, dtype)).numpy()
    for shard in range(layout.num_shards):
        rows = layout.rows(shard)
        with ShardWriter(folder, layout, shard, "settings") as writer:
            labels, indices = (stacked[name][rows.start : rows.stop].numpy() for name in ("class_labels", "indices"))
            writer.add(views[:, rows.start : rows.stop], labels, indices)
            writer.finish(left_out=[], num_unlabeled=0)
    shards = [read_shard(folder, layout, shard, "settings") for shard in range(layout.num_shards)]
    encoder = {"class": "AutoencoderMAE", "digest": encoder_digest(tokenizer)}
    metadata = {"format_version": 1, "statistics": {}, "tokenizer": encoder, "resolution": 16}
    (folder / "latents.json").write_text(json.dumps(metadata | describe_shards(layout, shards)))
    (folder / "settings.json").write_text(json.dumps({"data": data_identity(source)}))
    return folder


def test_cached_latents_give_the_numbers_of_their_tokenizer(make_options, image_folder, tokenizer_folders, tmp_path):
    cache = write_cache(tmp_path / "cached", image_folder, tokenizer_folders[0])
    share = {"held_out_split": None, "held_out_share": 0.25}
    both = [str(tokenizer_folders[0]), str(cache)]
    options = make_options(tokenizer=both, **share)
    encoded, cached = run_analysis(options)["tokenizers"].values()
    assert encoded["encoder"] == cached["encoder"]
    assert cached["latents"]["num_images"] == {"train": 36, "held_out": 12}
    for part in ("probe", "mixtures", "channels"):
        one, other = (json.dumps(timeless(result[part])) for result in (encoded, cached))
        assert np.allclose(numbers(one), numbers(other), rtol=1e-4, atol=1e-5), part
    # without the images, too, and the choice of held-out ones is the same
    alone = make_options(tokenizer=[str(cache)], dataset=None, output_dir=str(tmp_path / "alone"), **share)
    (result,) = run_analysis(alone)["tokenizers"].values()
    assert result["probe"]["accuracy"] == cached["probe"]["accuracy"]


def numbers(text):
    found = []

    def visit(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
        elif isinstance(value, int | float):
            found.append(value)

    visit(json.loads(text))
    return [value for value in found if abs(value) > 1e-4]  # gradients at a minimum are rounding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out_split": "test"}, "of one split"),
        ({"dataset": "other"}, "not of the images of `dataset`"),
    ],
)
def test_caches_of_other_images_are_refused(make_options, image_folder, tokenizer_folders, tmp_path, change, message):
    cache = write_cache(tmp_path / "cached", image_folder, tokenizer_folders[0])
    if change.get("dataset") == "other":
        for shade, name in enumerate(CLASSES):
            write_images(tmp_path / "other", "train", name, range(50, 50 + NUM_TRAIN), shade)
        change = {"dataset": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=message):
        run_analysis(make_options(**{"tokenizer": [str(cache)], "held_out_split": None} | change))


def test_missing_packages_are_named_before_any_work(make_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"umap-learn.*maetok_hf\[analysis\].*leave 'umap' out"):
        run_analysis(make_options(parts=["umap"], tokenizer=["nothing"]))
    check_packages(["probe"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib.*maetok_hf\[analysis\]"):
        check_packages(["probe"])


def test_a_full_disk_is_refused_before_encoding(make_options, monkeypatch):
    forbid(monkeypatch, subjects.EncodedImages, "blocks")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match="`output_dir`.*make room"):
        run_analysis(make_options())


def test_parts_are_found_by_everything_they_depend_on(tmp_path):
    store = PartStore(tmp_path)
    assert store.compute("probe", {"l2": 1.0}, lambda: {"value": 1}) == {"value": 1}
    assert store.compute("probe", {"l2": 1.0}, lambda: {"value": 2}) == {"value": 1}
    assert store.compute("probe", {"l2": 2.0}, lambda: {"value": 3}) == {"value": 3}
    assert store.compute("other", {"l2": 1.0}, lambda: {"value": 4}) == {"value": 4}


MEASURE = """
import sys
import torch
from tests.analysis.test_run import peak_memory
torch.set_num_threads(1)
print(peak_memory(sys.argv[1]))
"""


def write_random_cache(folder, num_images):
    layout = LatentLayout(num_images, 64, 8, 1, "float32", rows_per_shard=4096, class_names=CLASSES)
    for shard in range(layout.num_shards):
        rows = np.array(layout.rows(shard))
        generator = np.random.default_rng(shard)
        with ShardWriter(folder, layout, shard, "settings") as writer:
            latents = generator.standard_normal((1, len(rows), 64, 8), dtype=np.float32)
            latents += np.float32(rows % 3)[:, None, None] / 10
            writer.add(latents, rows % 3, rows)
            writer.finish(left_out=[], num_unlabeled=0)
    shards = [read_shard(folder, layout, shard, "settings") for shard in range(layout.num_shards)]
    metadata = {"format_version": 1, "statistics": {}, "tokenizer": {"digest": "0" * 32}, "resolution": 16}
    metadata |= describe_shards(layout, shards)
    (folder / "latents.json").write_text(json.dumps(metadata))


def peak_memory(folder: str) -> float:
    """Largest memory of this process in MiB during an analysis, without pages of files."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) / 1024)
            time.sleep(0.005)

    options = AnalysisOptions(
        tokenizer=[folder],
        output_dir=f"{folder}/out",
        parts=["statistics", "probe", "mixtures"],
        probe_max_iterations=2,
        mixture_sizes=[4],
        mixture_seeds=[0],
        mixture_max_iterations=2,
    )
    thread = threading.Thread(target=watch)
    thread.start()
    run_analysis(options)
    done.set()
    thread.join()
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    used = []
    for size in (36_000, 144_000):  # 70 and 281 MiB of latents
        folder = tmp_path / str(size)
        folder.mkdir()
        write_random_cache(folder, size)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        used.append(float(result.stdout.splitlines()[-1]))
    assert used[1] < used[0] + 120, used  # what allocators keep varies by some tens
