"""Property tests that users run on their own SDEs and solvers.

`check_sde(sde)` runs every check of `SDE_CHECKS`, `check_solver(solver)` every check of `SOLVER_CHECKS`; each is also
a function of the SDE or solver by itself, for `pytest.mark.parametrize`. The strategies `linear_sdes()`, `time_grids()`
and `gaussian_targets()` need hypothesis (extra `test`) and are imported on first use.
"""

from typing import Any

from sdediff.testing.checks import SDE_CHECKS as SDE_CHECKS
from sdediff.testing.checks import check_sde as check_sde
from sdediff.testing.solver_checks import SOLVER_CHECKS as SOLVER_CHECKS
from sdediff.testing.solver_checks import check_solver as check_solver

_STRATEGIES = ("linear_sdes", "time_grids", "gaussian_targets")


def __getattr__(name: str) -> Any:
    if name in _STRATEGIES:
        from sdediff.errors import optional_import

        optional_import("hypothesis", "test")
        from sdediff.testing import strategies

        return getattr(strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
