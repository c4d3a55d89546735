"""The table: a column for each tokenizer, and in it what was measured."""

import pytest

from maetok_hf.analysis.report import make_report, to_markdown
from maetok_hf.analysis.run import run_analysis


def latents(**more):
    images = {"train": 10, "held_out": 5}
    nothing = {"train": 0, "held_out": 1}
    shape = {"shape": [6, 4], "resolution": 16, "split": "train", "class_names": None, "num_classes": 3}
    return {"class": "Any", "encoder": "f" * 32} | {
        "latents": shape | {"num_images": images, "num_corrupt": nothing, "num_unlabeled": nothing}, **more
    }  # fmt: skip


def curve(values, gaussian=10.0, dimensions=4):
    cells = [
        {"num_components": size, "seed": seed, "held_out_nll": nll, "seconds": 1.5, "device": "cpu"}
        for size, numbers in values.items()
        for seed, nll in enumerate(numbers)
    ]
    data = {"num_dimensions": dimensions, "explained_variance": 0.9123, "gaussian_held_out_nll": gaussian}
    return {"cells": cells, "data": data}


def cells(table, heading):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {heading} "))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_likelihoods_are_means_with_deviations_and_the_best_is_named(make_options):
    one = latents(mixtures=curve({2: [9.0, 8.0], 4: [7.0, 9.4]}), spectrum={"num_dimensions": 3, "variances": [1.0]})
    other = latents(mixtures=curve({2: [9.0, 9.0], 4: [8.5, 8.5]}), spectrum={"num_dimensions": 4, "variances": [1.0]})
    options = make_options(parts=["mixtures"])
    table = to_markdown(make_report(options, {"one": one, "a|b": other}))
    assert cells(table, "2") == ["8.500 ± 0.707", "9.000 ± 0.000"]
    assert cells(table, "NLL, best mixture (components)") == ["8.200 (4)", "8.500 (4)"]
    assert cells(table, "gain over one Gaussian (nats a dimension)") == ["0.4500", "0.3750"]
    assert cells(table, "principal components it needs") == ["3", "4"]
    assert cells(table, "mixtures, time (s)") == ["6.0 on cpu", "6.0 on cpu"]
    assert "a\\|b" in table and "linear probe" not in table


def test_probes_that_did_not_converge_say_so(make_options):
    probe = {"accuracy": 0.5, "top5_accuracy": 0.75, "cross_entropy": None, "num_unseen": 3, "train_accuracy": 1.0}
    probe |= {"converged": False, "gradient": 1e-3, "seconds": 2.0, "device": "cuda"}
    options = make_options(parts=["probe"])
    table = to_markdown(make_report(options, {"one": latents(probe=probe)}))
    assert cells(table, "linear probe, top 1 (%)") == ["50.00 (not converged: derivative 1.0e-03)"]
    assert cells(table, "linear probe, top 5 (%)") == ["75.00"]
    assert cells(table, "linear probe, cross-entropy (nats)") == [
        "infinite (3 images of classes without a training image)"
    ]
    assert cells(table, "left out: corrupt, without a class") == ["1, 1"]


def test_protocol_names_what_the_numbers_depend_on(make_options):
    options = make_options(seed=7, probe_l2=0.02, mixture_variance=0.8, num_dimensions=2, mixture_covariance="full")
    data, rank, probe, mixtures = run_analysis(options)["protocol"]
    assert "48 training images" in data and "split test, 18 held-out images" in data and "seed 7" in data
    assert "l2 0.02" in probe and "(2 for all tokenizers" in mixtures and "full covariances" in mixtures
    assert "Effective rank" in rank
    cached = make_options(parts=["mixtures"], dataset=None, split="train", held_out_split=None)
    one = latents()
    one["latents"]["split"] = "validation"
    line = make_report(cached, {"one": one})["protocol"][0]
    assert "split validation, 10 training images" in line and "cropped" not in line
    own = make_report(make_options(parts=["mixtures"], same_dimension=False), {"one": latents()})["protocol"][1]
    assert "cannot be compared" in own


@pytest.mark.parametrize("pictures", [(), ("mixtures.png",)])
def test_pictures_are_shown_where_they_are(make_options, pictures):
    text = to_markdown(make_report(make_options(parts=["statistics"]), {"one": latents()}), pictures)
    assert text.count("](") == len(pictures)
