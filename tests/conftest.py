"""Profiles of hypothesis, and one thread for every test process."""

import os
import warnings

import torch
from hypothesis import HealthCheck, Phase, settings

with warnings.catch_warnings(action="ignore"):  # torch.jit, on the first use of forward mode
    import torch._decomp.decompositions_for_jvp  # noqa: F401

torch.set_num_threads(1)

slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=slow, max_examples=25)
# For the mutants: find a counterexample, do not polish it.
settings.register_profile(
    "mutants", settings.get_profile("ci"), max_examples=10, phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("dev", deadline=None, suppress_health_check=slow, max_examples=25)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
