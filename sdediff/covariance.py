r"""Covariances: what the forward process makes of them, and data recoloured to one of them.

Under a linear SDE the covariance of data moves as `S_t = alpha^2 S + sigma^2 I`: its axes stay, and each eigenvalue
moves by itself (`exact.Gaussian.marginal`). If the data is Gaussian, with mean m, the probability-flow ODE is linear,
and its map from time t to time s is known,

    x_s = alpha_s m + S_s^(1/2) S_t^(-1/2) (x_t - alpha_t m),

with symmetric square roots. So a single linear map makes data of noise, and "recolouring" is the one-step generator of
a Gaussian model. For rows x with mean m and covariance C,

    y = m + (x - m) C^(-1/2) C_1^(1/2)    has covariance    C_1^(1/2) C^(-1/2) C C^(-1/2) C_1^(1/2) = C_1.

(Where C and C_1 commute, as they do above, this is the map from one Gaussian to the other that moves points least; of
others it is one of many maps with that covariance.) For the sample covariance of n rows with the singular value
decomposition `x - m = U D V^T`, the whitened rows `(x - m) C^(-1/2) = sqrt(n - 1) U V^T` need no division by small
numbers, and so the result is as exact for a nearly singular C as for any other.

References: Song et al. 2021 (arXiv:2011.13456), the probability flow; Kessy, Lewin and Strimmer, Optimal whitening and
decorrelation, 2018, whitening by symmetric roots; Olkin and Pukelsheim 1982, the optimal map between Gaussians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdediff.errors import OptionError, ShapeError
from sdediff.shapes import State, check_state


def recolor(
    x: State, cov: Tensor | float, *, mean: Tensor | float | None = None, x_cov: Tensor | float | None = None
) -> State:
    """Rows moved linearly to covariance `cov`, with their mean kept: `mean + (x - mean) C^(-1/2) cov^(1/2)`.

    C is the sample covariance of x, and the sample covariance of the result is `cov`; or the covariance that the law of
    x is known to have, as it is for noise, and then every row is moved by itself: `recolor(noise, cov, mean=0,
    x_cov=1.0)` has draws of N(0, cov). `recolor(x, 1.0)` whitens.

    If C is singular (to the rounding of its dtype), its pseudo-inverse is taken, as long as `cov` asks for no variance
    where x has none.

    Args:
        x: `(batch, *event)`; events are flattened to D entries.
        cov: the covariance to have, `(D, D)`, or `(D,)` for a diagonal, or a number for a multiple of the identity.
        mean: mean of the law of x, shaped as an event or a number.
        x_cov: its covariance, shaped as `cov`. Give both or neither.

    Returns:
        Shaped as x, with its dtype; computed in float64.

    Raises:
        ShapeError: shapes that do not fit, or fewer than two rows without a known covariance.
        OptionError: a covariance that is not finite, symmetric and positive semi-definite (to its dtype's rounding);
            `cov` has variance in directions in which x has none, or x in directions in which x_cov has none; or only
            one of mean and x_cov is given.
    """
    flat = _flat(x)
    eigenvalues, axes = _eigen(cov, flat.shape[1], "cov")
    root = _symmetric(axes, eigenvalues.sqrt()).to(flat)
    if mean is None and x_cov is None:
        centred = _centred(flat)
        centre = flat.mean(0)
        white, basis = _whitened(centred, 20 * torch.finfo(x.dtype).eps * flat.norm().item())
        source, cure = "x", f"Give at least {flat.shape[1] + 1} rows, or the known mean=... and x_cov=... of noise."
    elif mean is not None and x_cov is not None:
        centre = _centre(mean, x).to(flat)
        known, basis = _eigen(x_cov, flat.shape[1], "x_cov")
        present = known > max(1e-14, len(known) * _precision(x_cov)) * known.max()
        known, basis = known[present], basis[:, present].to(flat)
        centred = flat - centre
        stray = (centred - centred @ basis @ basis.T).abs().max().item() if not bool(present.all()) else 0.0
        if stray > 1e-5 * flat.abs().max().item():
            raise OptionError(
                f"x_cov has variance in {basis.shape[1]} of {len(root)} directions, but rows of x leave them by up to "
                f"{stray:.3g}: x cannot have this mean and covariance. Leave both out to take them from the rows."
            )
        white = centred @ _symmetric(basis, known.rsqrt().to(flat))
        source, cure = "x_cov", "Give a cov whose range lies in that of x_cov."
    else:
        raise OptionError(
            f"{'mean' if mean is None else 'x_cov'} is missing: the law of x is known by both of mean and x_cov. "
            "Write recolor(x, cov, mean=..., x_cov=...), or neither, to take both from the rows of x."
        )
    outside = (root - basis @ (basis.T @ root)).square().sum().item()
    if outside > 1e-11 * eigenvalues.max().item():
        raise OptionError(
            f"{source} has variance in {basis.shape[1]} of {len(root)} directions (of {len(x)} rows), and cov asks for "
            f"{outside:.3g} outside of them, which no linear map can make. {cure}"
        )
    return (centre + white @ root).to(x.dtype).reshape(x.shape)


def covariance_error(x: State, cov: Tensor | float) -> tuple[float, float]:
    """How far the sample covariance of x is from `cov`, and how far it would be by sampling alone.

    The distance is `|C_x - cov| / |cov|` in the Frobenius norm. For n independent rows of a law with covariance C and
    deviations y from its mean, the mean of its square would be

        (E |y|^4 - |C|^2) / n + ((tr C)^2 + |C|^2) / (n (n - 1)),

    divided by `|cov|^2`, with C and `E |y|^4` taken from the rows of x; its root is returned as the second number.

    Args:
        x: `(batch, *event)`, at least two rows.
        cov: as in `recolor`, and not zero.

    Returns:
        `(error, floor)`, without unit.
    """
    flat = _flat(x).cpu()
    n, size = flat.shape
    eigenvalues, axes = _eigen(cov, size, "cov")
    scale = eigenvalues.square().sum().item()
    if scale == 0:
        raise OptionError("cov is zero; a relative error needs one that is not.")
    centred = _centred(flat)
    found = centred.T @ centred / (n - 1)
    square, fourth = found.square().sum().item(), centred.square().sum(1).square().mean().item()
    by_chance = (fourth - square) / n + (found.trace().item() ** 2 + square) / (n * (n - 1))
    error = (found - _symmetric(axes, eigenvalues)).norm().item()
    return error / math.sqrt(scale), math.sqrt(by_chance / scale)


def _flat(x: State) -> Tensor:
    check_state(x)
    flat = x.reshape(len(x), -1).double()
    if not bool(flat.isfinite().all()):
        rows = (~flat.isfinite().all(1)).nonzero()[:, 0].tolist()
        raise OptionError(f"x must be finite; rows {rows[:8]} have NaN or infinite entries. Drop them.")
    return flat


def _centred(flat: Tensor) -> Tensor:
    if len(flat) < 2:
        raise ShapeError(f"A sample covariance needs at least two rows; got {len(flat)}.")
    return flat - flat.mean(0)


def _whitened(centred: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """`(x - m) C^(-1/2)`, and the directions `(D, r)` in which the rows vary by more than rounding."""
    left, singular, right = torch.linalg.svd(centred, full_matrices=False)
    present = singular > rounding
    left, right = left[:, present], right[present]
    return math.sqrt(len(centred) - 1) * left @ right, right.T


def _symmetric(axes: Tensor, eigenvalues: Tensor) -> Tensor:
    return axes * eigenvalues @ axes.T


def _eigen(cov: Tensor | float, size: int, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues >= 0 and axes, float64 on the CPU, of a covariance in any of its forms."""
    matrix = torch.as_tensor(cov, dtype=torch.float64).detach().cpu()
    if matrix.ndim == 0 or matrix.shape == (size,):
        matrix = torch.diag(matrix.expand(size))
    if matrix.shape != (size, size):
        raise ShapeError(
            f"{name} must have shape ({size}, {size}) for events of {size} entries, or ({size},) for a diagonal, or be "
            f"a number for a multiple of the identity; got {tuple(matrix.shape)}."
        )
    if not bool(matrix.isfinite().all()):
        raise OptionError(f"{name} has entries that are NaN or infinite.")
    rounding = max(1e-8, size * _precision(cov)) * matrix.abs().max().item()
    off = (matrix - matrix.T).abs().max().item()
    if off > rounding:
        raise OptionError(
            f"{name} must be symmetric; it differs from its transpose by up to {off:.3g}. If that is rounding, write "
            f"({name} + {name}.T) / 2."
        )
    eigenvalues, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
    if eigenvalues[0] < -rounding:
        raise OptionError(f"{name} must be positive semi-definite; its smallest eigenvalue is {eigenvalues[0]:.3g}.")
    return eigenvalues.clamp(min=0), axes


def _precision(cov: Tensor | float) -> float:
    """The rounding of its dtype; none of whole numbers, and of numbers that are not in a tensor."""
    return torch.finfo(cov.dtype).eps if isinstance(cov, Tensor) and cov.is_floating_point() else 0.0


def _centre(mean: Tensor | float, x: State) -> Tensor:
    centre = torch.as_tensor(mean, dtype=torch.float64).detach()
    if centre.ndim and centre.shape != x.shape[1:]:
        raise ShapeError(
            f"mean must have the shape of an event, {tuple(x.shape[1:])}, or be a number; got {tuple(centre.shape)}."
        )
    return centre.reshape(-1)
