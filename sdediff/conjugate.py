r"""Conjugate gradients: `S v = b` for symmetric positive semi-definite S that is known by its products only.

After k iterations v is the best of `span(b, S b, ..., S^(k-1) b)` in the norm of S, so that as many iterations as b has
entries, or as S has different eigenvalues, solve the system. Each iteration is one product:

    v <- v + a p,    r <- r - a S p,    p <- r + |r|^2 / |r_before|^2 p,        a = |r|^2 / p^T S p.

The residuals r are orthogonal to each other, but rounding makes them forget it, and then more iterations are needed,
many more where the eigenvalues of S are of different sizes. Where products are dear, residuals are kept and each new
one is made orthogonal to them, which restores what is said above.

References: Hestenes and Stiefel 1952; Golub and Van Loan, Matrix Computations, section 10.1, on full orthogonalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdediff.shapes import over, sum_rows

Product = Callable[[Tensor], Tensor]
"""`v -> M v` for rows of vectors."""


def conjugate_gradients(product: Product, b: Tensor, iterations: int, floor: float = 0.0, kept: int = 0) -> Tensor:
    """The solution v of `S v = b`, every row by itself. A row with a NaN in it, or in its products, becomes NaN.

    Args:
        product: `v -> S v`, `(batch, *m)` to the same.
        b: `(batch, *m)`, in the range of S.
        iterations: at most. A row ends early where nothing is left of its residual, or nothing of S along the next
            direction, `p^T S p / p^T p` being negative or 0, up to rounding.
        floor: what S is known to exceed, such as its `s^2`; a row ends as well where S is below 0.999 of it, and so is
            not what it should be.
        kept: of the first residuals, how many are kept to make the later ones orthogonal to them.
    """
    rounding = 4 * torch.finfo(b.dtype).eps
    v, r, p = torch.zeros_like(b), b, b
    square = sum_rows(r * r)
    least, largest = rounding**2 * square, torch.zeros_like(square)
    going, units = ~(square <= least), list[Tensor]()
    for _ in range(iterations):
        if b.is_cpu and not bool(going.any()):
            break
        if len(units) < kept:
            units.append(r * over(torch.where(going, square, 1.0).rsqrt(), r))
        image = product(p)
        curvature, size = sum_rows(p * image), sum_rows(p * p)
        largest = torch.maximum(largest, torch.where(going, curvature / torch.where(going, size, 1.0), 0.0))
        going = going & ~(curvature <= rounding * largest * size) & ~(curvature < 0.999 * floor * size)
        length = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        v, r = v + over(length, p) * p, r - over(length, p) * image
        for unit in units:
            r = r - over(sum_rows(unit * r), r) * unit
        before, square = square, torch.where(going, sum_rows(r * r), square)
        p = r + over(torch.where(going, square / torch.where(going, before, 1.0), 0.0), p) * p
        going = going & ~(square <= least)
    return v
