"""Curves of mixtures: the same numbers from memory, from files and after a stop; and modes that a picture hides."""

import json
import math

import numpy as np
import pytest
import torch

from maetok_hf.analysis import curve as module
from maetok_hf.analysis.curve import MixtureSettings, mixture_curve
from maetok_hf.analysis.mixture import draw_mixture, fit_mixture
from maetok_hf.analysis.principal_components import fit_principal_components


SIZES, SEEDS = (2, 5), (0, 1)


def latents(count: int, seed: int = 0) -> torch.Tensor:
    """Latents (count, 3 tokens, 2 channels) of five clusters."""
    fixed = torch.Generator().manual_seed(99)
    centres = 4 * torch.randn(5, 3, 2, generator=fixed) + 1
    noise = torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed))
    return centres[torch.arange(count) % 5] + noise


def curve(folder=None, **options):
    options = {"train": latents(150), "held_out": latents(60, seed=1), "sizes": SIZES, "seeds": SEEDS} | options
    return mixture_curve(folder=folder, **options)


def without_times(result) -> list[dict]:
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in result.to_dict()["cells"]]


def test_it_is_the_pipeline_of_scikit_learn():
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    result = curve(sizes=[1], seeds=[0], settings=MixtureSettings(covariance="full"))
    pipeline = make_pipeline(PCA(0.9, svd_solver="full"), StandardScaler(), GaussianMixture(1))
    pipeline.fit(latents(150).flatten(1).double().numpy())
    (cell,) = result.cells
    assert result.data.num_dimensions == pipeline[0].n_components_ < result.data.num_features == 6
    assert result.data.explained_variance == pytest.approx(pipeline[0].explained_variance_ratio_.sum(), rel=1e-9)
    score = pipeline.score(latents(60, seed=1).flatten(1).double().numpy())
    assert cell.held_out_nll == pytest.approx(-score, rel=1e-5)
    # of standardised and uncorrelated numbers one Gaussian knows no more than this
    entropy = result.data.num_dimensions / 2 * (1 + math.log(2 * math.pi))
    assert cell.train_nll == pytest.approx(entropy, rel=1e-5)
    assert result.data.gaussian_train_nll == pytest.approx(entropy, rel=1e-5)
    assert result.data.gaussian_held_out_nll == pytest.approx(cell.held_out_nll, rel=1e-5)


def test_cells_are_ordered_and_summarised_in_plain_numbers():
    result = curve(sizes=(5, 2), seeds=(1, 0))
    assert [(cell.num_components, cell.seed) for cell in result.cells] == [(2, 0), (2, 1), (5, 0), (5, 1)]
    values = {size: np.mean([c.held_out_nll for c in result.cells if c.num_components == size]) for size in SIZES}
    assert result.held_out_nll() == pytest.approx(values)
    assert result.best_size() == 5
    assert all(cell.converged and cell.iterations > 1 and cell.seconds > 0 for cell in result.cells)
    assert result.cells[2].held_out_nll < result.data.gaussian_held_out_nll
    assert json.loads(json.dumps(result.to_dict()))["data"]["num_train"] == 150


def test_a_folder_and_chunks_change_no_number(tmp_path):
    train, held_out = latents(150), latents(60, seed=1)
    expected = without_times(curve())
    result = curve(tmp_path / "new" / "cells", train=train.split(40), held_out=lambda: iter(held_out.split(7)))
    for ours, theirs in zip(without_times(result), expected, strict=True):
        assert ours["iterations"] == theirs["iterations"]
        assert ours["train_nll"] == pytest.approx(theirs["train_nll"], rel=1e-6)
        assert ours["held_out_nll"] == pytest.approx(theirs["held_out_nll"], rel=1e-6)
    names = sorted(path.name for path in (tmp_path / "new" / "cells").iterdir())
    assert names == [f"components_{size:04d}_seed_{seed}.json" for size in SIZES for seed in SEEDS]


def test_a_stopped_curve_goes_on_where_it_was(tmp_path, monkeypatch):
    expected = without_times(curve())
    fit, fitted = module.fit_mixture, []

    def stopping(*args, **kwargs):
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(None)
        return fit(*args, **kwargs)

    monkeypatch.setattr(module, "fit_mixture", stopping)
    with pytest.raises(KeyboardInterrupt):
        curve(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # and nothing else is left
    fitted.clear()
    resumed = curve(tmp_path)
    assert len(fitted) == 1
    assert without_times(resumed) == expected
    again = curve(tmp_path)
    assert len(fitted) == 1
    assert again == resumed  # with the times that were measured


def test_cells_of_other_latents_or_settings_are_refused(tmp_path):
    curve(tmp_path)
    for options, name in [
        ({"train": latents(150, seed=7)}, "total_variance"),
        ({"train": latents(149)}, "num_train"),
        ({"held_out": latents(60, seed=8)}, "gaussian_held_out_nll"),
        ({"settings": MixtureSettings(reg_covar=1e-5)}, "reg_covar"),
        ({"settings": MixtureSettings(covariance="full")}, "covariance"),
    ]:
        with pytest.raises(ValueError, match=f"is of other latents or settings \\({name}"):
            curve(tmp_path, **options)


def test_what_gives_no_curve_is_refused_before_anything_is_fitted(monkeypatch):
    monkeypatch.setattr(module, "fit_mixture", None)
    for options, message in [
        ({"sizes": ()}, "`sizes` must be at least one number"),
        ({"sizes": (2, 2)}, "none of them twice"),
        ({"seeds": ()}, "`seeds` must be at least one number"),
        ({"sizes": (2, 151)}, r"`sizes` must lie in \[1, 150\]"),
        ({"sizes": (0, 2)}, r"`sizes` must lie in"),
        ({"held_out": latents(0)}, "`held_out` has no samples"),
        ({"held_out": torch.zeros(5, 7)}, "7 features"),
        ({"train": torch.full((150, 6), torch.nan)}, "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            curve(**options)


def modes(num_modes: int, distance: float, seed: int) -> torch.Tensor:
    """3000 samples in 16 dimensions of equally likely modes of deviation 1 around centres of deviation `distance`."""
    centres = distance * torch.randn(num_modes, 16, generator=torch.Generator().manual_seed(num_modes))
    noise = torch.randn(3000, 16, generator=torch.Generator().manual_seed(seed))
    return centres[torch.arange(3000) % num_modes] + noise


def share_found(data: torch.Tensor, num_modes: int) -> float:
    """Share of the samples that are in the component of their mode, of a mixture of as many components as modes."""
    mixture = fit_mixture(data, draw_mixture(data, num_modes)).mixture
    component = mixture.joint_log_prob(data.double()).argmax(dim=1)
    counts = torch.zeros(num_modes, num_modes)
    counts.index_put_((torch.arange(len(data)) % num_modes, component), torch.ones(len(data)), accumulate=True)
    return (counts.max(dim=1).values.sum() / len(data)).item()


def test_mixtures_find_30_close_and_4_distant_modes_although_distances_and_pictures_mislead():
    """
    30 modes at 6 of their deviations from each other against 4 at 110: the complex latent space of the two is the one
    that looks simple. A mixture finds the modes of both, by their number and sample by sample. Mean distances and the
    plane of largest variance say the opposite: the 30 are close together there, in a cloud without parts.
    """
    sizes = (2, 4, 15, 30, 60)
    close, distant = (modes(30, 1.0, seed=1), modes(30, 1.0, seed=2)), (modes(4, 20.0, seed=1), modes(4, 20.0, seed=2))
    of_close, of_distant = (mixture_curve(*data, sizes, SEEDS) for data in (close, distant))
    assert of_close.best_size() == 30
    assert of_distant.best_size() == 4
    assert share_found(close[0], 30) > 0.8
    assert share_found(distant[0], 4) == 1
    # more components pay for the close modes as long as there are modes without one, for the distant ones at once
    assert np.diff([of_close.held_out_nll()[size] for size in (2, 4, 15, 30)]).max() < -0.1
    assert np.diff([of_distant.held_out_nll()[size] for size in (4, 15, 30, 60)]).min() > 0
    # by their distances the samples of 4 modes are the more diverse ones
    assert torch.pdist(close[0][:300]).mean() < 0.2 * torch.pdist(distant[0][:300]).mean()
    # and in the plane of largest variance, which a picture shows, the 30 modes flow into a few
    for data, best, num_modes, found in ((close, 8, 30, (0.0, 0.35)), (distant, 4, 4, (0.999, 1.0))):
        plane = fit_principal_components(data[0], num_components=2)
        in_plane = [plane.project(x) for x in data]
        assert mixture_curve(*in_plane, (1, best, 30), SEEDS).best_size() == best
        assert found[0] <= share_found(in_plane[0], num_modes) <= found[1]
