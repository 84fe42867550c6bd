"""Every architecture, by name, at a width that a test can afford."""

from __future__ import annotations

from sparsight.sae import (
    AbsTopK,
    Archetypal,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    SAEConfig,
    TopK,
)

WIDTH = 64

ARCHITECTURES: dict[str, SAEConfig] = {
    "topk": SAEConfig(WIDTH, sparsity=TopK(8)),
    "signed topk": SAEConfig(WIDTH, sparsity=TopK(8, rectify=False)),
    "tied topk": SAEConfig(WIDTH, sparsity=TopK(8), tied=True),
    "topk without b_dec": SAEConfig(WIDTH, sparsity=TopK(8), subtract_b_dec=False),
    "capped topk": SAEConfig(WIDTH, sparsity=TopK(8), soft_cap=3.0),
    "batch topk": SAEConfig(WIDTH, sparsity=BatchTopK(8)),
    "absolute topk": SAEConfig(WIDTH, sparsity=AbsTopK(8)),
    "group max": SAEConfig(WIDTH, sparsity=GroupMax(8)),
    "relu": SAEConfig(WIDTH, sparsity=ReLU(l1=0.5)),
    "weighted relu": SAEConfig(
        WIDTH,
        sparsity=ReLU(l1=0.5, weighted=True),
        unit_norm_decoder=False,
        subtract_b_dec=False,
    ),
    "jumprelu": SAEConfig(WIDTH, sparsity=JumpReLU()),
    "jumprelu with tanh": SAEConfig(WIDTH, sparsity=JumpReLU(penalty_kind="tanh")),
    "jumprelu with target": SAEConfig(WIDTH, sparsity=JumpReLU(target_l0=8)),
    "gated": SAEConfig(WIDTH, sparsity=Gated(l1=0.5)),
    "gated without b_dec": SAEConfig(WIDTH, sparsity=Gated(l1=0.5), subtract_b_dec=False),
    "matching pursuit": SAEConfig(WIDTH, sparsity=MatchingPursuit(8)),
    "archetypal": SAEConfig(WIDTH, sparsity=TopK(8), dictionary=Archetypal(n_anchors=32)),
}
