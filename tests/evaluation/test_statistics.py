"""Mean and covariance of features, in files that say what they are of."""

import json

import numpy as np
import pytest
import torch

from maetok_hf.evaluation import Moments, feature_moments, load_moments, save_moments
from maetok_hf.evaluation.statistics import write_arrays
from maetok_hf.moments import RunningMoments


DIM = 6


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    # far from 0, where sums of squares would lose their digits
    return torch.randn(101, DIM, generator=generator, dtype=torch.float64) @ mixing + 1e4


def moments_of(features):
    running = RunningMoments.zeros(DIM)
    running.update(features)
    return feature_moments(running)


def assert_close(moments, features):
    assert moments.num_samples == len(features)
    np.testing.assert_allclose(moments.mean, features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_of_features_are_those_of_numpy(features):
    assert_close(moments_of(features), features)


def test_one_sample_has_no_covariance(features):
    with pytest.raises(ValueError, match="two samples, got 1"):
        moments_of(features[:1])


def test_saved_moments_are_read_bit_by_bit_with_their_protocol(tmp_path, features):
    moments = {"pool": moments_of(features), "spatial": moments_of(features * 2)}
    path = tmp_path / "new" / "reference.npz"
    save_moments(path, moments, {"extractor": "tiny", "images": 101})
    found, protocol = load_moments(path, {"extractor": "tiny"})
    assert protocol == {"extractor": "tiny", "images": 101}
    assert list(found) == ["pool", "spatial"]
    for layer, (mean, covariance, num_samples) in moments.items():
        assert torch.equal(found[layer].mean, mean)
        assert torch.equal(found[layer].covariance, covariance)
        assert found[layer].num_samples == num_samples == 101
    assert [file.name for file in path.parent.iterdir()] == ["reference.npz"]


def test_saved_moments_have_the_keys_that_the_suite_of_adm_reads(tmp_path, features):
    moments = moments_of(features)
    save_moments(tmp_path / "reference.npz", {"pool": moments, "spatial": moments}, {})
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        np.testing.assert_array_equal(file["sigma_s"], moments.covariance)


def test_reference_file_of_adm_is_read_without_its_images(tmp_path, features):
    mean, covariance = features.numpy().mean(axis=0), np.cov(features.numpy(), rowvar=False)
    arrays = {"mu": mean, "sigma": covariance, "mu_s": mean[:2].astype(np.float32), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "reference.npz", np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    moments, protocol = load_moments(tmp_path / "reference.npz", {"extractor": "tiny"})
    assert protocol is None
    assert moments["pool"].num_samples is None
    np.testing.assert_array_equal(moments["pool"].covariance, covariance)
    assert moments["spatial"].mean.dtype == torch.float64


def test_statistics_of_another_extractor_are_refused(tmp_path, features):
    save_moments(tmp_path / "reference.npz", {"pool": moments_of(features)}, {"extractor_digest": "aa"})
    with pytest.raises(ValueError, match="extractor_digest: 'aa' there, 'bb' now"):
        load_moments(tmp_path / "reference.npz", {"extractor_digest": "bb"})


def test_files_without_statistics_are_named(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="holds no statistics.*only arr_0.*NpzImages"):
        load_moments(tmp_path / "images.npz")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"mu of shape \(3,\) and sigma of \(4, 4\)"):
        load_moments(tmp_path / "wrong.npz")
    whole = (tmp_path / "images.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cut.npz is no whole \.npz file"):
        load_moments(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="layers 'pool', 'spatial', got \\['logits'\\]"):
        save_moments(tmp_path / "x.npz", {"logits": Moments(torch.zeros(1), torch.zeros(1, 1))}, {})


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    write_arrays(path, {"protocol": np.array(json.dumps({}))})
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        write_arrays(path, {"protocol": np.array("other")})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
