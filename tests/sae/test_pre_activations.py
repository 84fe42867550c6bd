from __future__ import annotations

import pytest
import torch

from architecture_cases import ARCHITECTURES
from editing_parts import make_sae
from sparsight.errors import UserError
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK

D_IN = 24


def vectors(n: int = 50) -> torch.Tensor:
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(3)) + 1


def by_hand(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """The formula of the docstring, in float64."""
    z = (x.double() - sae.normaliser.mean.double()) / sae.normaliser.scale.double()
    if sae.config.subtract_b_dec:
        z = z - sae.b_dec.double()
    if not sae.config.sparsity.has_encoder:
        return z @ sae.W_dec.double().T
    return z @ sae.W_enc.double().T + sae.b_enc.double()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pre_activations_are_those_of_the_formula_for_every_sparsity(name: str) -> None:
    x = vectors()
    sae = make_sae(D_IN, ARCHITECTURES[name], x=x).requires_grad_(False)
    scores = sae.pre_activations(x)
    torch.testing.assert_close(scores, by_hand(sae, x).float(), rtol=1e-4, atol=1e-4)
    chosen = [5, 0, 63]
    torch.testing.assert_close(sae.pre_activations(x, chosen), scores[:, chosen])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pre_activations_have_gradients_where_a_latent_is_off(name: str) -> None:
    x = vectors().requires_grad_(True)
    sae = make_sae(D_IN, ARCHITECTURES[name], x=x.detach()).requires_grad_(False)
    (gradient,) = torch.autograd.grad(sae.pre_activations(x, [7]).sum(), x)
    assert bool((gradient.abs().sum(1) > 0).all())


def test_active_latents_of_topk_have_their_pre_activations() -> None:
    x = vectors()
    sae = make_sae(D_IN, SAEConfig(64, sparsity=TopK(8)), x=x).requires_grad_(False)
    code = sae.encode(x).dense()
    active = code > 0
    torch.testing.assert_close(code[active], sae.pre_activations(x)[active], rtol=1e-4, atol=1e-4)


def test_a_latent_that_does_not_exist_has_no_pre_activation() -> None:
    with pytest.raises(UserError, match="no latent 64; it has 0 to 63"):
        make_sae(D_IN).pre_activations(vectors(), [64])
