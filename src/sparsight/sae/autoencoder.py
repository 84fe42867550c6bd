"""The sparse autoencoder: one class, assembled from the parts that its configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.figures import figure_of
from sparsight.kernels import backend
from sparsight.notebooks import html_table
from sparsight.sae.code import SparseCode
from sparsight.sae.config import Archetypal, SAEConfig
from sparsight.sae.dictionary import archetypal_rows, keep_archetypal
from sparsight.sae.initialisation import blank_parameters, initial_parameters
from sparsight.sae.normaliser import Normaliser
from sparsight.sae.precision import wide, without_autocast
from sparsight.sae.sparsity import Weights
from sparsight.tensor_files import sha256_tensors


class SAEOutput(NamedTuple):
    """The result of a forward pass."""

    x_hat: Float[Tensor, "batch d_out"]
    """The reconstruction, in the units of x; for a transcoder, the prediction of its target."""

    code: SparseCode
    """The active latents."""


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder; inputs and outputs are in the model's units, the normaliser is inside.

    With z = normaliser(x): scores are W_enc (z − b_dec) + b_enc, the sparsity turns them into the
    code f, and the reconstruction is normaliser⁻¹(Σ f_i W_dec[i] + b_dec) (Gao et al. 2024, section
    2.3). Rows are latents in both matrices. `train()` and `eval()` matter only for sparsities that
    look at the whole batch in training.

    A transcoder predicts the activations of another site, its target: `d_out` is their width and
    `target_normaliser` their normaliser; with `skip`, W_skip z is added. A normaliser that measures
    each vector measures only the input; the target is in the same units, as in ViT-Prisma.

    Whatever the dtype of the vectors and parameters, `encode`, `decode` and `forward` compute and
    return float32, or float64 if the parameters are float64. A vector that holds NaN or infinity
    gets a code that is NaN (one entry, of latent 0) and a reconstruction that is NaN; the other
    vectors of the batch are not affected.

    Args:
        d_in: width of the activations, at least 1.
        config: the parts.
        d_out: width of a transcoder's target; None for an autoencoder.
        normaliser: normaliser fitted to the activations; the identity if None.
        target_normaliser: normaliser fitted to a transcoder's target; the identity if None.
        sample: a sample of activations in normalised space, for the scale of the initial encoder.
        seed: seed of the initial parameters.
        blank: leave the parameters uninitialised, for a caller that loads them.
        metadata: origin of the SAE: model, site, tokens, images, …; JSON-compatible.

    Attributes:
        loaded_from: the folder from which an SAE in our format was loaded, or None.

    Raises:
        UserError: a width is not a whole number of at least 1, or the parts do not fit each other,
            the widths, or the number of latents.
    """

    def __init__(
        self,
        d_in: int,
        config: SAEConfig | None = None,
        *,
        d_out: int | None = None,
        normaliser: Normaliser | None = None,
        target_normaliser: Normaliser | None = None,
        sample: Float[Tensor, "batch d_in"] | None = None,
        seed: int = 0,
        blank: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = config or SAEConfig()
        d_in = _width(d_in, "d_in")
        d_out = None if d_out is None else _width(d_out, "d_out")
        _check_parts(config, d_out)
        _check_widths(config, d_in, d_out, normaliser, target_normaliser, sample)
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        self.is_transcoder = d_out is not None
        self.n_latents = config.width(d_in)
        self.config = dataclasses.replace(config, n_latents=self.n_latents)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.loaded_from: Path | None = None
        if blank:
            start = blank_parameters(d_in, self.config, d_out)
        else:
            start = initial_parameters(d_in, self.config, seed, sample, d_out)
        buffers = set(config.sparsity.buffers)
        if isinstance(config.dictionary, Archetypal):
            # The mixture determines the rows; they are stored for those who only use the SAE.
            buffers |= {"W_dec", "anchors"}
            dictionary = dataclasses.replace(config.dictionary, n_anchors=len(start["anchors"]))
            self.config = dataclasses.replace(self.config, dictionary=dictionary)
        self._extra = tuple(name for name in start if name not in _WEIGHTS)
        for name, each in start.items():
            if config.tied and name == "W_dec":
                continue
            if name in buffers:
                self.register_buffer(name, each)
            else:
                self.register_parameter(name, nn.Parameter(each))
        if config.tied:
            self.register_parameter("W_dec", self.W_enc)
            self.register_state_dict_post_hook(_drop_tied)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_add_tied)  # type: ignore[no-untyped-call]
        self.normaliser = normaliser or Normaliser.identity(d_in, config.normaliser)
        self.target_normaliser: Normaliser | None = None
        if self.is_transcoder:
            self.target_normaliser = target_normaliser or Normaliser.identity(
                self.d_out, config.normaliser
            )

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: Tensor
    b_dec: nn.Parameter
    W_skip: nn.Parameter
    anchors: Tensor
    mixture: nn.Parameter
    relaxation: nn.Parameter
    threshold: Tensor
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def weights(self) -> Weights:
        """Return the tensors that determine codes, at least float32, with gradients to the
        parameters."""
        b_dec = wide(self.b_dec)
        extra = {name: wide(getattr(self, name)) for name in self._extra}
        W_enc, b_enc, W_dec = wide(self.W_enc), wide(self.b_enc), wide(self.W_dec)
        if "mixture" in extra and torch.is_grad_enabled() and extra["mixture"].requires_grad:
            W_dec = archetypal_rows(extra)
        centre = b_dec if self.config.subtract_b_dec else b_enc.new_zeros(self.d_in)
        return Weights(W_enc, b_enc, W_dec, b_dec, centre, extra)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the active latents of each vector; NaN for vectors with NaN or infinity.

        Args:
            x: vectors of any real dtype.

        Raises:
            UserError: x is not a tensor of real numbers, or the vectors have another width.
        """
        x = self._vectors(x)
        with without_autocast(x.device):
            return self._encode(x)

    def pre_activations(
        self, x: Float[Tensor, "batch d_in"], latents: Sequence[int] | None = None
    ) -> Float[Tensor, "batch latents"]:
        """Return the scores by which the sparsity chooses latents, with gradients to x.

        They also say how far a latent is from being active, where `encode` gives 0 and no gradient.
        W_enc (z − centre) + b_enc for most kinds; the gate's, if gated; for matching pursuit, which
        has no encoder, the first correlations W_dec (z − centre). A `soft_cap` is not applied.

        Args:
            x: vectors of any real dtype.
            latents: numbers of the latents to compute; default: all.

        Raises:
            UserError: a latent does not exist; or x is not a tensor of real numbers of this width.
        """
        x = self._vectors(x)
        weights = self.weights()
        if latents is not None:
            rows = torch.tensor(self._checked(latents), device=x.device)
            weights = dataclasses.replace(
                weights,
                W_enc=weights.W_enc[rows],
                b_enc=weights.b_enc[rows],
                W_dec=weights.W_dec[rows],
            )
        with without_autocast(x.device):
            return self.config.sparsity.scores(
                weights, self.normaliser(x, self.normaliser.frame(x))
            )

    def decode(self, code: SparseCode) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction of a code, in the units of x.

        It lacks a transcoder's skip connection, which needs x.

        Raises:
            UserError: the code has another number of latents; or the normaliser measures each
                vector, and the code lacks these measures.
        """
        if code.n_latents != self.n_latents:
            raise UserError(
                f"The code has {code.n_latents:,} latents, but the SAE has {self.n_latents:,}."
            )
        with without_autocast(code.values.device):
            return self._undo(self._decode(code), code)

    def forward(self, x: Float[Tensor, "batch d_in"]) -> SAEOutput:
        """Encode and decode; see `encode`."""
        x = self._vectors(x)
        with without_autocast(x.device):
            code = self._encode(x)
            z_hat = self._decode(code)
            if self.config.skip:
                z_hat = z_hat + self.normaliser(x, code.frame) @ wide(self.W_skip).T
            return SAEOutput(self._undo(z_hat, code), code)

    @torch.no_grad()
    def constrain(self) -> None:
        """Restore the parameters' constraints after a step of an optimiser.

        Decoder rows return to norm 1 or near the hull of the anchors, thresholds above 0.
        """
        weights = self.weights()
        if "mixture" in weights.extra:
            assert isinstance(self.config.dictionary, Archetypal)
            keep_archetypal(weights.extra, self.config.dictionary.delta)
            self.W_dec.copy_(archetypal_rows(weights.extra))
        elif self.config.unit_norm_decoder:
            self.W_dec.div_(weights.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
        self.config.sparsity.constrain(weights)
        for name, each in weights.extra.items():
            if each is not getattr(self, name):  # a wider copy
                getattr(self, name).copy_(each)

    def fold(self) -> SparseAutoencoder:
        """Return an SAE that computes the same reconstructions and codes without a normaliser.

        With x̂ = s ⊙ (f W_dec + b_dec) + m: W_enc ← W_enc / s, W_dec ← s ⊙ W_dec and
        b_dec ← s ⊙ b_dec + m; an encoder that does not subtract b_dec gets b_enc ← b_enc − W_enc m
        (and, if gated, b_mag ← b_mag − exp(r_mag) ⊙ W_enc m).
        For a transcoder, s and m on the side of the decoder are the target's, and
        W_skip ← s_out ⊙ W_skip / s, b_dec ← b_dec − W_skip m. Decoder rows no longer have norm 1.
        Frozen parameters stay frozen; `train()` or `eval()`, device and dtype stay the same.

        Raises:
            UserError: the normaliser measures each vector by itself, or the encoder has no weights
                of its own, so that folding is impossible; or the folded weights are beyond the
                range of the parameters' dtype.
        """
        if self.normaliser.per_vector:
            raise UserError(
                f"The normaliser {self.normaliser.kind!r} depends on each vector, so it cannot be "
                "folded into the weights."
            )
        if not self.config.sparsity.has_encoder and self.config.normaliser != "none":
            raise UserError(
                f"{type(self.config.sparsity).__name__} encodes with its decoder rows, so a "
                "normaliser cannot be folded into the weights. Train with the normaliser 'none' "
                "instead."
            )
        without = dataclasses.replace(
            self.config,
            normaliser="none",
            unit_norm_decoder=False,
            tied=self.config.tied and self.config.normaliser == "none",
            dictionary=SAEConfig().dictionary,
        )
        folded = SparseAutoencoder(
            self.d_in,
            without,
            d_out=self.d_out if self.is_transcoder else None,
            blank=True,
            metadata=self.metadata,
        ).to(self.W_enc.device, self.W_enc.dtype)
        with torch.no_grad():
            for name, each in self._folded_weights().items():
                target = getattr(folded, name).copy_(each)
                if target.dtype != each.dtype and bool((target.isinf() & ~each.isinf()).any()):
                    raise UserError(
                        f"{name} with the normaliser folded in is beyond the range of "
                        f"{target.dtype}. Fold it in float32: sae.float().fold()."
                    )
        self._pass_on_freezing(folded)
        return folded.train(self.training)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {value}" for name, value in self._summary())
        return f"SparseAutoencoder({shown})"

    def _repr_html_(self) -> str:
        return html_table(self._summary())

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the parameters: the same in memory, saved, and loaded again.

        Parameters in half precision count as the float32 numbers used in computation.
        """
        return sha256_tensors({name: wide(each) for name, each in self.state_dict().items()})

    def save_pretrained(self, folder: str | Path, *, format: str | None = None) -> Path:
        """Write the SAE into a folder.

        Args:
            folder: created if it does not exist.
            format: another project's format, such as "saelens" (see `sparsight.formats`); None is
                our own: `config.json`, `sae.safetensors` and a model card.

        Raises:
            UserError: the format is unknown, or cannot hold this SAE.
            SparsightError: the disk is full or the folder cannot be written.
        """
        if format is not None:
            from sparsight.formats import find

            return find(format).save(self, Path(folder))
        from sparsight.sae.files import save

        return save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        filename: str | None = None,
        device: str | torch.device | None = None,
    ) -> SparseAutoencoder:
        """Load an SAE from a folder, a file or the Hub, in our format or another project's.

        Args:
            name: a path, or a name on the Hub: "org/repo", "org/repo/folder", "org/repo/file.pt".
            revision: branch, tag or commit on the Hub.
            subfolder: folder inside the folder or repository.
            filename: file inside that.
            device: device for the SAE; the CPU by default.

        Raises:
            UserError: there is no SAE, or none that can be read; or torch does not find the device.
            SparsightError: its files are damaged.
        """
        from sparsight.formats import load

        return load(name, revision=revision, subfolder=subfolder, filename=filename, device=device)

    def _summary(self) -> list[tuple[str, str]]:
        """Describe the SAE in a few names and values."""
        about = self.metadata
        model = about.get("model")
        summary = [
            (
                "width",
                f"{self.d_in:,} → {self.d_out:,}" if self.is_transcoder else f"{self.d_in:,}",
            ),
            ("latents", f"{self.n_latents:,}"),
            ("sparsity", self.config.sparsity.describe(training=False)),
            ("normaliser", self.config.normaliser),
            ("site", str(about.get("site") or "unknown")),
        ]
        if about.get("tokens"):
            summary.append(("tokens", str(about["tokens"])))
        if isinstance(model, dict) and model.get("id"):
            summary.append(("model", str(model["id"])))
        if fvu := self._known_fvu():
            summary.append((figure_of("fvu").label, fvu))
        return summary

    def _known_fvu(self) -> str:
        """Return the FVU if the folder of the SAE holds it; otherwise an empty string."""
        if self.loaded_from is None or any(each.requires_grad for each in self.parameters()):
            return ""  # it may have changed since
        from sparsight.sae.files import known_fvu

        value, where = known_fvu(self.loaded_from)
        return "" if value is None else f"{figure_of('fvu').show(value)} ({where})"

    def _encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        frame = self.normaliser.frame(x)
        z = self.normaliser(x, frame)
        bad = _not_finite(z)
        if bad is not None:
            z = z.masked_fill(bad[:, None], 0)  # so that it does not affect the others' choice
        code = self.config.sparsity.encode(self.weights(), z, training=self.training)
        cap = self.config.soft_cap
        if cap is not None:
            code = dataclasses.replace(code, values=cap * (code.values / cap).tanh())
        if bad is not None:
            code = code.with_nan(bad)
        return code if frame is None else dataclasses.replace(code, frame=frame)

    def _folded_weights(self) -> dict[str, Tensor]:
        """Return the tensors of `fold`, at least float32; its docstring gives the formulas."""
        weights = self.weights()
        out = self.target_normaliser or self.normaliser
        mean, scale = wide(self.normaliser.mean), wide(self.normaliser.scale)
        out_mean, out_scale = wide(out.mean), wide(out.scale)
        sparsity = self.config.sparsity
        folded = {name: weights.extra[name] for name in sparsity.start(1)}
        folded |= {"W_enc": weights.W_enc / scale, "b_enc": weights.b_enc}
        if not self.config.subtract_b_dec:
            shift = folded["W_enc"] @ mean
            folded["b_enc"] = weights.b_enc - shift
            folded |= sparsity.shifted(weights.extra, shift)
        folded["W_dec"] = wide(self.W_dec) * out_scale
        folded["b_dec"] = weights.b_dec * out_scale + out_mean
        if self.config.skip:
            folded["W_skip"] = out_scale[:, None] * wide(self.W_skip) / scale
            folded["b_dec"] = folded["b_dec"] - folded["W_skip"] @ mean
        return folded

    def _pass_on_freezing(self, other: SparseAutoencoder) -> None:
        """Let the parameters of another SAE require gradients if this one's do."""
        learns = {name: each.requires_grad for name, each in self.named_parameters()}
        learns.setdefault("W_dec", learns.get("mixture", learns["W_enc"]))
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(learns[name])

    def _decode(self, code: SparseCode) -> Float[Tensor, "batch d_out"]:
        weights = self.weights()
        values = code.values.to(weights.W_dec.dtype)
        return backend().decode(values, code.indices, code.offsets, weights.W_dec, weights.b_dec)

    def _undo(
        self, z_hat: Float[Tensor, "batch d_out"], code: SparseCode
    ) -> Float[Tensor, "batch d_out"]:
        out: Tensor = (self.target_normaliser or self.normaliser).invert(z_hat, code.frame)
        return out

    def _checked(self, latents: Sequence[int]) -> list[int]:
        """Check the numbers of latents and return them as a list."""
        for latent in latents:
            if not 0 <= latent < self.n_latents:
                raise UserError(
                    f"The SAE has no latent {latent}; it has 0 to {self.n_latents - 1}."
                )
        return list(latents)

    def _vectors(self, x: Tensor) -> Tensor:
        """Check the shape of vectors and return them in the dtype of the computation."""
        if not isinstance(x, Tensor) or x.is_complex():
            given = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"The SAE takes a torch tensor of real numbers [batch, {self.d_in}]; got {given}."
            )
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(
                f"The SAE takes vectors of width {self.d_in} as [batch, {self.d_in}]; "
                f"got a tensor of shape {list(x.shape)}."
            )
        return x.to(torch.promote_types(self.W_enc.dtype, torch.float32))


_WEIGHTS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"})


def _width(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    return int(value)


def _check_widths(
    config: SAEConfig,
    d_in: int,
    d_out: int | None,
    normaliser: Normaliser | None,
    target_normaliser: Normaliser | None,
    sample: Tensor | None,
) -> None:
    """Check that normalisers and sample have the width of the activations."""
    if d_in == 1 and config.normaliser == "layer_norm":
        raise UserError(
            "normaliser is 'layer_norm', which uses the deviation of a vector's entries, but d_in "
            "is 1 and one entry has none. Choose another normaliser."
        )
    if sample is not None and (sample.ndim != 2 or sample.shape[1] != d_in or not len(sample)):
        raise UserError(
            f"sample has the shape {list(sample.shape)}; expected [batch, {d_in}] with at least "
            "one vector."
        )
    for name, given, width in (
        ("normaliser", normaliser, d_in),
        ("target_normaliser", target_normaliser, d_out),
    ):
        if given is not None and width is not None and len(given.mean) != width:
            raise UserError(f"{name} has width {len(given.mean)}; expected {width}.")


def _not_finite(z: Float[Tensor, "batch d_in"]) -> Bool[Tensor, " batch"] | None:
    """Return the mask of vectors that hold NaN or infinity; None if there are none."""
    z = z.detach()
    # A single sum is quick, and it is finite only if all vectors are.
    if bool(torch.isfinite(z.sum())):
        return None
    bad = ~torch.isfinite(z).all(dim=1)
    return bad if bool(bad.any()) else None


def _check_parts(config: SAEConfig, d_out: int | None) -> None:
    if d_out is None:
        if config.skip:
            raise UserError(
                "skip works only with transcoders; in an autoencoder it would learn the identity."
            )
        return
    for name, bad in {
        "subtract_b_dec (set it to False; --sae.no-subtract-b-dec)": config.subtract_b_dec,
        "tied": config.tied,
        f"sparsity {type(config.sparsity).__name__}": not config.sparsity.has_encoder,
        "an archetypal dictionary": isinstance(config.dictionary, Archetypal),
    }.items():
        if bad:
            raise UserError(
                f"A transcoder cannot have {name}, because input and target are different spaces."
            )


def _drop_tied(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    state.pop(f"{prefix}W_dec", None)


def _add_tied(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    if f"{prefix}W_enc" in state:
        state.setdefault(f"{prefix}W_dec", state[f"{prefix}W_enc"])
