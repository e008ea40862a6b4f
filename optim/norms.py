"""Norm balls: the linear minimisation oracle (LMO), the norm, the dual norm and an initialisation of each.

A weight W has shape (d_out, d_in); a convolution (o, i, k, …) is seen as (o, i·k…), and a stack of matrices (…, d_out, d_in)
as matrices with a ball each. Dimension factors: Scion (Pethick et al., "Training Deep Learning Models with Norm-Constrained
LMOs", arXiv 2502.07529, table 3), so that one learning rate serves every width.

Each norm is ‖W‖ = base(W) / factor, so that its unit ball is `factor` times the base ball:

    lmo(M) = argmin over ‖Z‖ ≤ 1 of ⟨M, Z⟩ = -factor · direction(M)         ⟨M, lmo(M)⟩ = -dual_norm(M)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .polar import METHODS, normalized, polar

SCALES = ("scion", "muon", "moonlight", "none")
# What a tensor of three dimensions or more is: see `get_norm`.
VIEWS = ("convolution", "stack")


def spectral_factor(shape: torch.Size, scale: str) -> float:
    """The size of the spectral update of a weight of this shape, by the rule `scale`.

    scion: √(d_out/d_in), over k² for a k×k convolution. muon: √max(1, d_out/d_in) (Jordan 2024).
    moonlight: 0.2·√max(d_out, d_in), which matches AdamW's update RMS (Liu et al., arXiv 2502.16982). none: 1.
    """
    d_out, d_in, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    if scale == "scion":
        return math.sqrt(d_out / shape[1]) / kernel
    if scale == "muon":
        return math.sqrt(max(1, d_out / d_in))
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return 1.0


class Norm:
    """A norm ball for one parameter. The ball of a stack of matrices holds the stacks whose every matrix lies in its own ball.

    `scale` chooses the spectral norm's factor; the other norms know only Scion's ("none" makes every factor 1).
    `polar` and `steps` are those of `optim.polar.polar`. `stack`: the last two dimensions are a matrix, the others a batch.
    """

    name: str
    min_ndim = 0
    by_shape = True  # whether the direction or the factor depends on which dimensions are rows and columns
    entrywise = False  # whether each entry of a direction depends on the same entry of the input alone

    def __init__(
        self, scale: str = "scion", polar: str = "polar_express", steps: int | None = None, stack: bool = False
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        if polar not in METHODS:
            raise ValueError(f"polar must be one of {', '.join(METHODS)}, got {polar!r}")
        self.scale, self.polar, self.steps, self.stack = scale, polar, steps, stack

    def factor(self, shape: torch.Size) -> float:
        """The dimension factor of a parameter of this shape."""
        return 1.0 if self.scale == "none" else self._factor(shape[-2:] if self.stack else shape)

    def matrix(self, w: Tensor) -> Tensor:
        """W as `direction` takes it: a matrix (d_out, d_in), a stack (…, d_out, d_in), or a vector."""
        return w.flatten(1) if w.ndim > 2 and not self.stack else w

    def separable(self, shape: torch.Size, dim: int) -> bool:
        """Whether a part of a parameter that is cut along this dimension has a direction of its own."""
        return self.entrywise or (self.stack and dim < len(shape) - 2)

    def direction(self, m: Tensor, overwrite: bool = False) -> Tensor:
        """The maximiser of ⟨M, Z⟩ over the base ball; zero for M = 0. A new tensor, or M's own memory with `overwrite`."""
        raise NotImplementedError

    def lmo(self, m: Tensor) -> Tensor:
        """argmin over ‖Z‖ ≤ 1 of ⟨M, Z⟩, in M's shape and dtype; zero for M = 0. M is not modified."""
        return _float(self.direction(self.matrix(m))).mul_(-self.factor(m.shape)).reshape(m.shape).to(m.dtype)

    def norm(self, w: Tensor) -> Tensor:
        """‖W‖, a scalar in float32 at least."""
        return self._base(_float(self.matrix(w))).amax() / self.factor(w.shape)

    def dual_norm(self, m: Tensor) -> Tensor:
        """max over ‖Z‖ ≤ 1 of ⟨M, Z⟩, a scalar in float32 at least."""
        return self._dual_base(_float(self.matrix(m))).sum() * self.factor(m.shape)

    @torch.no_grad()
    def init(self, w: Tensor, radius: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Fill W in place with a random point of the sphere of this radius, and return it."""
        gaussian = torch.empty_like(_float(w)).normal_(generator=generator)
        exact = type(self)(self.scale, "svd", stack=self.stack)
        return w.copy_(exact.lmo(gaussian).mul_(-radius))

    def _factor(self, shape: torch.Size) -> float:
        return 1.0

    def _base(self, w: Tensor) -> Tensor:
        """The base norm, or values whose maximum it is."""
        raise NotImplementedError

    def _dual_base(self, m: Tensor) -> Tensor:
        """The dual of the base norm, or values whose sum it is."""
        raise NotImplementedError


def _length(m: Tensor, dim: tuple[int, ...] | int | None = None) -> Tensor:
    """The Euclidean norm along `dim`; the squares are summed in float64 if the device has it."""
    wide = torch.float64 if m.device.type != "mps" else torch.float32
    return torch.linalg.vector_norm(m, dim=dim, dtype=wide).to(m.dtype)


class Spectral(Norm):
    """The largest singular value; the LMO is the polar factor (Muon)."""

    name = "spectral"
    min_ndim = 2

    def direction(self, m: Tensor, overwrite: bool = False) -> Tensor:
        return polar(m, self.polar, self.steps, overwrite=overwrite)

    def _factor(self, shape: torch.Size) -> float:
        return spectral_factor(shape, self.scale)

    def _base(self, w: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(w, 2)

    def _dual_base(self, m: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(m, "nuc")


class Sign(Norm):
    """The largest entry; the LMO is the sign (Scion's output and tied-embedding layers). A vector's d_in is 1."""

    name = "sign"
    entrywise = True

    def direction(self, m: Tensor, overwrite: bool = False) -> Tensor:
        return torch.sign(m, out=m if overwrite else None)

    def _factor(self, shape: torch.Size) -> float:
        return 1 / math.prod(shape[1:])

    def _base(self, w: Tensor) -> Tensor:
        return w.abs()

    def _dual_base(self, m: Tensor) -> Tensor:
        return m.abs()


class ColNorm(Norm):
    """Norm of the longest column. Each input feature (token of a (d_model, vocabulary) embedding) has its own ball."""

    name = "colnorm"
    min_ndim = 2
    _dim = -2

    def direction(self, m: Tensor, overwrite: bool = False) -> Tensor:
        return normalized(m, self._dim, overwrite=overwrite)

    def _factor(self, shape: torch.Size) -> float:
        return math.sqrt(shape[0])

    def _base(self, w: Tensor) -> Tensor:
        return _length(w, self._dim)

    def _dual_base(self, m: Tensor) -> Tensor:
        return _length(m, self._dim)


class RowNorm(ColNorm):
    """Norm of the longest row. Each output feature (token of a (vocabulary, d_model) embedding) has its own ball."""

    name = "rownorm"
    _dim = -1

    def _factor(self, shape: torch.Size) -> float:
        return 1 / math.sqrt(math.prod(shape[1:]))


class Frobenius(Norm):
    """The Euclidean norm of all entries; the LMO is normalised SGD."""

    name = "frobenius"
    by_shape = False

    def direction(self, m: Tensor, overwrite: bool = False) -> Tensor:
        return normalized(m, self._dims, overwrite=overwrite)

    @property
    def _dims(self) -> tuple[int, int] | None:
        return (-2, -1) if self.stack else None

    def _base(self, w: Tensor) -> Tensor:
        return _length(w, self._dims)

    def _dual_base(self, m: Tensor) -> Tensor:
        return _length(m, self._dims)


class RMS(Frobenius):
    """The root mean square of all entries, for gains and biases."""

    name = "rms"

    def _factor(self, shape: torch.Size) -> float:
        return math.sqrt(math.prod(shape))


def _float(m: Tensor) -> Tensor:
    """In float32 at least: linalg has no bfloat16, and sums in bfloat16 are coarse."""
    return m.to(torch.promote_types(m.dtype, torch.float32))


NORMS: dict[str, Callable[..., Norm]] = {n.name: n for n in (Spectral, Sign, ColNorm, RowNorm, Frobenius, RMS)}


def get_norm(
    name: str,
    shape: torch.Size,
    scale: str = "scion",
    polar: str = "polar_express",
    steps: int | None = None,
    view: str | None = None,
) -> Norm:
    """The norm of this name for a parameter of this shape; `auto` is rms for vectors and scalars, else spectral.

    `view` says what a tensor of three dimensions or more is: a `convolution` (o, i, k, …), seen as one matrix (o, i·k…), or a
    `stack` of matrices (…, d_out, d_in), each with its own ball. Four dimensions and more are a convolution by default.
    Raises ValueError for an unknown name, if the norm needs a matrix and the shape is a vector's, and for three dimensions
    without a view, which may be either.
    """
    if name == "auto":
        name = "spectral" if len(shape) >= 2 else "rms"
    if not isinstance(name, str) or name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join([*NORMS, 'adamw', 'auto'])}, got {name!r}")
    norm = NORMS[name](scale, polar, steps, stack=view == "stack" and len(shape) > 2)
    if len(shape) < norm.min_ndim:
        raise ValueError(
            f"norm={name!r} needs parameters of {norm.min_ndim} dimensions or more, got one of shape {tuple(shape)}: "
            "put it into a group with norm='rms', 'sign' or 'adamw' (or 'auto', which chooses by shape)"
        )
    if norm.by_shape and len(shape) == 3 and view is None:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} may be a convolution (o, i, k) or a stack of matrices (n, d_out, d_in): "
            "put view='convolution' or view='stack' into its group"
        )
    return norm
