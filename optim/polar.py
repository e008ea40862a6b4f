"""The polar factor U Vᵀ of a matrix M = U S Vᵀ, for stacks of matrices.

Two iterations of odd quintic polynomials, p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X, which need nothing but batched products, and
the SVD. The iterations push every singular value towards 1. With σ measured against ‖M‖_F, five steps bring σ ≥ 0.003 into
0.68…1.21 (`newton_schulz`), or σ ≥ 0.001 into 0.84…1.13 (`polar_express`; eight steps are exact to rounding). Smaller values
end up lower. These optimizers are known to train well with that.
"""

import functools
import math

import torch
from torch import Tensor

# One row (a, b, c) per iteration; the last one repeats.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Amsel, Persson, Musco, Gower: "The Polar Express", arXiv 2505.16932, Algorithm 1: the optimal composition for
    # singular values in [1e-3, 1]. `_SAFETY` is the paper's margin against rounding in bfloat16, for all rows but the last.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.8913014077874002, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    # Jordan: "Muon: an optimizer for hidden layers", 2024: coefficients with a large slope at zero.
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
}
_SAFETY = {"polar_express": 1.01, "newton_schulz": 1.0}
_STEPS = 5
METHODS = (*COEFFICIENTS, "svd")
# With fewer rows or columns, products on a CPU are not faster in bfloat16 (measured on Zen 4: 32 lose 20%, 64 gain 60%).
_SMALL_ON_CPU = 64


@functools.cache
def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device has bfloat16 units, so that it multiplies matrices faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(test is not None and test() for test in tests)
    return False


def work_dtype(matrix: Tensor, method: str) -> torch.dtype:
    """The dtype that the factor of a matrix, or of a stack of them, is computed in.

    float64 stays float64. The SVD, and small matrices on a CPU, use float32. Everything else uses bfloat16 if the device has
    units for it, and float32 if not.
    """
    if matrix.dtype == torch.float64:
        return torch.float64
    small = matrix.device.type == "cpu" and min(matrix.shape[-2:]) < _SMALL_ON_CPU
    return torch.float32 if method == "svd" or small or not has_bfloat16_units(matrix.device) else torch.bfloat16


def normalized(x: Tensor, dim: tuple[int, ...] | int | None, safety: float = 1.0, overwrite: bool = False) -> Tensor:
    """x divided by `safety` times its Euclidean norm along `dim`; zero if that is zero. Computed in x itself with `overwrite`.

    A power of two brings the entries near 1 first: float32 loses the squares of entries below 1e-19 or above 1e19.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.linalg.vector_norm(x, 1, dim=dim, keepdim=True, dtype=wide)
    power = (total * (total.numel() / max(1, x.numel()))).log2_().round_().exp2_()
    x = torch.div(x, _nonzero(power), out=x if overwrite else None)
    return x.div_(_nonzero(torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide) * safety))


def _nonzero(divisor: Tensor) -> Tensor:
    """A divisor that leaves zeros zero and lets NaN through."""
    return torch.where(divisor == 0, 1, divisor)


def polar(matrix: Tensor, method: str = "polar_express", steps: int | None = None, *, overwrite: bool = False) -> Tensor:
    """The polar factor of each matrix of a stack (…, m, n); zero for a zero matrix.

    The input is not modified, unless `overwrite` allows it (this saves a buffer).

    `steps` counts iterations (default 5). The result is in `work_dtype(matrix, method)`. `svd` is exact and leaves out
    directions whose singular value is zero to rounding.
    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"polar must be one of {', '.join(METHODS)}, got {method!r}")
    dtype = work_dtype(matrix, method)
    if method == "svd":
        return _polar_by_svd(matrix.to(dtype))
    safety = _SAFETY[method]
    steps = _STEPS if steps is None else steps
    *rows, last = COEFFICIENTS[method]
    rows = ([(a / safety, b / safety**3, c / safety**5) for a, b, c in rows] + [last] * steps)[:steps]
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    shape = x.shape
    x = x.reshape(math.prod(shape[:-2]), *shape[-2:])
    # ‖X‖_F bounds every singular value.
    x = normalized(x, (-2, -1), safety, overwrite and x.dtype == dtype).to(dtype)
    x = _iterate(x, rows).view(shape)
    return x.mT if tall else x


def _iterate(x: Tensor, rows: list[tuple[float, float, float]]) -> Tensor:
    """Apply the polynomials to a wide stack (n, m, k), m ≤ k, which is overwritten; four buffers, reused."""
    gram = x.new_empty(x.size(0), x.size(1), x.size(1))
    poly = torch.empty_like(gram)
    out = torch.empty_like(x)
    for a, b, c in rows:
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, poly, x, beta=a, out=out)
        x, out = out, x
    return x


def _polar_by_svd(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = s[..., :1] * max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps
    return (u * (s > floor).unsqueeze(-2)) @ vh
