from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsight.errors import SparsightError, UserError
from sparsight.evaluation import ReconstructionMeter

FIGURES = {
    "fvu",
    "explained_variance",
    "mse",
    "clipscope_mse",
    "clipscope_ev",
    "fvu_batch",
    "cosine",
    "relative_bias",
    "fvu_by_position",
    "mse_by_position",
}


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    # Far from the origin, and different at every position, so that centring matters.
    x = torch.randn(37, 5, 11, generator=g) + 30 + 3 * torch.arange(5)[:, None]
    return x, x + 0.3 * torch.randn(x.shape, generator=g) - 0.1


def measured(x, x_hat, batch=37):
    meter = ReconstructionMeter(x.shape[1], x.shape[2])
    for a, b in zip(x.split(batch), x_hat.split(batch), strict=True):
        meter.add(a, b)
    return meter.result()


def by_hand(x, x_hat):
    x, y = x.double().numpy(), x_hat.double().numpy()
    v, w = x.reshape(-1, x.shape[2]), y.reshape(-1, x.shape[2])
    fvu = ((v - w) ** 2).sum() / ((v - v.mean(0)) ** 2).sum()
    spread = ((v - v.mean(1, keepdims=True)) ** 2).sum(1)
    per_position = ((x - x.mean(0)) ** 2).sum((0, 2))
    norms = np.linalg.norm(v, axis=1) * np.linalg.norm(w, axis=1)
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": ((v - w) ** 2).mean(),
        "clipscope_mse": ((v - w) ** 2).sum(1).mean(),
        "clipscope_ev": (1 - ((v - w) ** 2).sum(1) / spread).mean(),
        "fvu_batch": fvu,
        "cosine": ((v * w).sum(1) / norms).mean(),
        "relative_bias": (w**2).sum() / (v * w).sum(),
        "fvu_by_position": ((x - y) ** 2).sum((0, 2)) / per_position,
        "mse_by_position": ((x - y) ** 2).mean((0, 2)),
    }


def test_every_figure_equals_its_formula_over_the_whole_matrix(data):
    found, expected = measured(*data), by_hand(*data)
    assert set(found) == set(expected) == FIGURES
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("batch", [1, 8])
def test_figures_do_not_depend_on_the_batch_size(data, batch):
    found, whole = measured(*data, batch), measured(*data)
    for name in FIGURES - {"fvu_batch"}:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-11, err_msg=name)


def test_fvu_batch_is_the_mean_over_separately_centred_batches(data):
    parts = zip(data[0].split(8), data[1].split(8), strict=True)
    expected = np.mean([by_hand(x, x_hat)["fvu"] for x, x_hat in parts])
    assert measured(*data, 8)["fvu_batch"] == pytest.approx(expected, rel=1e-9)


def test_the_mean_explains_nothing_and_a_copy_everything(data):
    x, _ = data
    mean = x.mean(dim=(0, 1)).expand_as(x)
    assert measured(x, mean)["fvu"] == pytest.approx(1, abs=1e-5)
    copy = measured(x, x)
    assert (copy["fvu"], copy["mse"], copy["clipscope_ev"]) == (0, 0, 1)
    assert copy["cosine"] == pytest.approx(1) and copy["relative_bias"] == pytest.approx(1)


def test_an_undefined_figure_is_none_and_never_nan():
    constant = torch.full((4, 2, 3), 7.0)
    found = measured(constant, constant)
    assert found["fvu"] is None and found["clipscope_ev"] is None
    assert found["explained_variance"] is None and found["fvu_by_position"] == [None, None]
    zero = measured(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3))
    assert zero["cosine"] == 0 and zero["relative_bias"] is None


def test_a_vector_without_spread_is_left_out_of_clipscope_ev():
    x = torch.tensor([[[2.0, 2.0]], [[1.0, 3.0]]])
    assert measured(x, x + 0.5)["clipscope_ev"] == pytest.approx(1 - 0.5 / 2)


def test_numbers_that_are_not_finite_are_a_fault(data):
    x_hat = data[1].clone()
    x_hat[3, 2, 1] = float("nan")
    with pytest.raises(SparsightError, match="not finite"):
        measured(data[0], x_hat)


def test_no_data_and_wrong_shapes_are_refused():
    meter = ReconstructionMeter(5, 11)
    with pytest.raises(UserError, match="no vectors to measure"):
        meter.result()
    with pytest.raises(UserError, match=r"\[2, 4, 11\]"):
        meter.add(torch.zeros(2, 4, 11), torch.zeros(2, 4, 11))


def test_cls_and_patches_each_have_an_fvu_about_their_own_mean(data):
    x, x_hat = data
    meter = ReconstructionMeter(x.shape[1], x.shape[2])
    meter.add(x, x_hat)
    apart = meter.result(n_prefix=2, has_cls=True)
    assert apart["fvu_cls"] == pytest.approx(by_hand(x[:, :1], x_hat[:, :1])["fvu"])
    assert apart["fvu_patches"] == pytest.approx(by_hand(x[:, 2:], x_hat[:, 2:])["fvu"])
    assert "fvu_cls" not in meter.result(n_prefix=0, has_cls=False)
