"""Training and evaluation mode: where a network is asked for values, dropout and batch norms must not make them random.

Torch has a mode for every module, and `eval()` forgets what it was. A network that a run borrows gets its modes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def evaluating(network: object) -> Iterator[None]:
    """Evaluation mode for a network that is or holds an `nn.Module`, and its own modes again afterwards."""
    modules = getattr(network, "modules", None)
    modes = {} if modules is None else {module: module.training for module in modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
