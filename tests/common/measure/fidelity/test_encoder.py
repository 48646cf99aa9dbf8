import numpy as np
import pytest
import torch
from tiny_studies import tiny_study

from common.measure.fidelity.encoder import FEATURES, descriptors, study_encoder, train_encoder, worsen
from common.phantom.draw import public_phantoms

SEED = 4_242  # of phantoms that the encoder has not seen


@pytest.fixture(scope="module")
def study():
    return tiny_study()


@pytest.fixture(scope="module")
def encoder(study):
    return train_encoder(public_phantoms(study, 1, 96).astype(np.float32), name="test", steps=60, seed=1)


@pytest.fixture(scope="module")
def unseen(study):
    return public_phantoms(study, SEED, 24).astype(np.float32)


def test_the_same_seed_gives_the_same_net_and_another_seed_another():
    pairs = np.random.default_rng(0).uniform(0, 1, (8, 2, 16, 16, 16)).astype(np.float32)
    first, again, other = (train_encoder(pairs, name="test", steps=2, seed=s) for s in (5, 5, 6))
    assert first.digest == again.digest != other.digest
    assert np.array_equal(first(pairs), again(pairs))


def test_training_leaves_threads_and_global_generators_alone():
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    pairs = np.random.default_rng(0).uniform(0, 1, (4, 2, 16, 16, 16)).astype(np.float32)
    train_encoder(pairs, name="test", steps=1, seed=0)(pairs)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_scan_has_the_same_features_whatever_comes_with_it(encoder, unseen):
    together = encoder(unseen)
    assert together.shape == (len(unseen), FEATURES)
    assert np.allclose(together[3:4], encoder(unseen[3:4]), rtol=0, atol=1e-12)
    assert np.allclose(together[::-1], encoder(unseen[::-1]), rtol=0, atol=1e-12)


def test_features_of_the_phantoms_are_centred_and_uncorrelated(study, encoder):
    features = encoder(public_phantoms(study, 1, 96).astype(np.float32))
    assert np.abs(features.mean(axis=0)).max() < 1e-6
    covariance = np.cov(features.T)
    assert np.linalg.eigvalsh(covariance).max() == pytest.approx(1.0, abs=0.01)


def test_the_net_is_cached_for_its_study_and_says_what_it_is(study, monkeypatch):
    monkeypatch.setattr("common.measure.fidelity.encoder._STEPS", 2)
    monkeypatch.setattr("common.measure.fidelity.encoder._PHANTOMS", 16)
    other = study.model_copy(update={"study": "short-net"})
    net = study_encoder(other)
    assert net is study_encoder(other)
    assert net.name == "phantom encoder 1, vessels 16x16x16, 64 features"
    assert len(net.digest) == 64


def test_descriptors_tell_a_labels_size_place_and_grey_value():
    pair = torch.full((1, 2, 8, 8, 8), -0.5)
    pair[:, 1] = 0.0
    pair[:, :, :2, :4], pair[:, 1, :2, :4] = 0.75, 1.0
    found = descriptors(pair)[0, 29:].tolist()
    share, places, (mean_outside, mean_inside, deviation_outside, deviation_inside) = found[0], found[1:7], found[7:]
    assert share == pytest.approx(np.log(1 / 8))
    assert places[0::2] == pytest.approx([-6 / 7, -4 / 7, 0.0], abs=1e-5)  # centres along each axis
    assert places[1] == pytest.approx(1 / 7, abs=1e-5)
    assert (mean_outside, mean_inside) == pytest.approx((-0.5, 0.75))
    assert (deviation_outside, deviation_inside) == pytest.approx((0.0, 0.0), abs=1e-3)


def test_what_was_done_to_a_pair_is_told_and_an_untouched_one_exists():
    pairs = torch.rand(200, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    worse, done = worsen(pairs, torch.Generator().manual_seed(1))
    assert worse.shape == pairs.shape
    assert float(worse[:, 0].abs().max()) <= 1.0
    assert 0.35 < float((done[:, 2] == 0).float().mean()) < 0.65  # noise
    still = done[:, 3:].abs().sum(dim=1) == 0
    assert torch.equal(worse[still, 1:], pairs[still, 1:])
    assert not torch.equal(worse[~still, 1:], pairs[~still, 1:])


def test_other_shapes_and_too_few_phantoms_are_refused(encoder, unseen):
    with pytest.raises(ValueError, match="this encoder reads"):
        encoder(unseen[:, :1])
    with pytest.raises(ValueError, match="two phantoms"):
        train_encoder(unseen[:1], name="test", steps=1, seed=0)
