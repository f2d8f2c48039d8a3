"""Bad input gets a sentence: the type of the error, the value that offends, and what to write instead."""

import re
import sys

import pytest
import torch
from torch import nn

import sdediff as sd
from sdediff import grids
from sdediff.errors import (
    CapabilityError,
    CheckFailure,
    CheckpointError,
    DivergenceError,
    MissingExtraError,
    OptionError,
    SDEError,
    ShapeError,
    TimeError,
)

F64 = torch.float64
VP = sd.VP()
TARGET = sd.exact.Gaussian(torch.tensor([0.5, -1.0], dtype=F64), 0.3)
MODEL = TARGET.model(VP)
LINE = sd.exact.Gaussian(torch.zeros(1), 1.0).model(VP)
CHAIN = sd.DiscreteVP(torch.linspace(0.01, 0.3, 10))


def x(*shape):
    return torch.zeros(shape, dtype=F64)


def net(x, t):
    return torch.zeros_like(x)


def scales(alpha, sigma, **attributes):
    """A process with these scales."""
    body = {"scales": lambda self, t: (alpha(t), sigma(t)), "t_min": 1e-3} | attributes
    return type("Custom", (sd.LinearSDE,), body)()


def rates(drift_rate, diffusion):
    body = {"rates": lambda self, t: (drift_rate(t), diffusion(t))}
    return type("Custom", (sd.LinearSDE,), body)()


class Nonlinear(sd.SDE):
    def drift(self, t, x):
        return -(x**3)

    def diffusion(self, t, x):
        return 1.0


class Coloured(sd.SDE):
    """A diffusion that differs between the entries."""

    def drift(self, t, x):
        return -x

    def diffusion(self, t, x):
        return torch.linspace(1, 2, x[0].numel(), dtype=x.dtype).expand_as(x)


class Unbroadcast(sd.SDE):
    """A drift that was written for one event shape only."""

    def drift(self, t, x):
        return x @ torch.eye(2, dtype=x.dtype)

    def diffusion(self, t, x):
        return 1.0


def nonlinear():
    return sd.ScoreModel(lambda x, t: -x, Nonlinear(), "score")


def trainable():
    return sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1), VP)


def labelled():
    return sd.ScoreModel(sd.networks.MLP((2,), width=8, depth=1, classes=3), VP)


def fit(model=None, data=None, **options):
    options = {"steps": 2, "batch_size": 4, "progress": False, "seed": 0} | options
    return sd.fit(trainable() if model is None else model, torch.randn(9, 2) if data is None else data, **options)


def codes(*values):
    return torch.tensor(values).reshape(-1, 1)


def case(error, call, *says, id):
    """A bad input: what is raised, by what, and what the message must say."""
    return pytest.param(error, call, says, id=id)


SHAPES = [
    case(ShapeError, lambda: sd.over(x(3), x(4, 2)), "(3,)", "(4, 2)", "give shape ()", id="coefficient"),
    case(ShapeError, lambda: sd.over(x(1, 2), x(4, 2)), "(1, 2)", "(4,) for one value per row", id="coefficient grid"),
    case(ShapeError, lambda: VP.perturb(torch.rand(3), x(4, 2), x(4, 2)), "(3,)", "(4,)", id="perturb, time per row"),
    case(
        ShapeError, lambda: VP.perturb(0.5, x(4, 2), x(4, 1)), "(4, 1)", "(4, 2)", "must be equal", id="perturb, noise"
    ),
    case(ShapeError, lambda: VP.perturb(0.5, x(4).long(), x(4)), "torch.int64", "x0.float()", id="perturb, integers"),
    case(ShapeError, lambda: VP.perturb(0.5, [1.0], x(1)), "list", "tensor", id="perturb, list"),
    case(ShapeError, lambda: VP.simulate(x(), torch.tensor([0.1, 0.5])), "no dimensions", "x0[None]", id="simulate"),
    case(ShapeError, lambda: MODEL.score(torch.rand(3), x(4, 2)), "(3,)", "(4,)", id="score, time per row"),
    case(ShapeError, lambda: MODEL.noise(torch.rand(4, 1), x(4, 2)), "(4, 1)", "(4,)", id="noise, time per row"),
    case(
        ShapeError, lambda: MODEL.noise(0.5, torch.zeros(4, 2).long()), "torch.int64", "x.float()", id="integer state"
    ),
    case(ShapeError, lambda: MODEL.noise(0.5, x(4, 3)), "(4, 3)", "(batch, 2)", id="oracle, another event"),
    case(
        ShapeError,
        lambda: sd.ScoreModel(lambda x, t: x[:, :1], VP).noise(0.5, x(4, 2)),
        "shaped as x, (4, 2)",
        "returned (4, 1)",
        id="network output of another shape",
    ),
    case(
        ShapeError,
        lambda: sd.ScoreModel(lambda x, t: (x, t), VP).noise(0.5, x(4, 2)),
        "(4, 2)",
        "returned tuple",
        id="network output that is no tensor",
    ),
    case(ShapeError, lambda: sd.sample(MODEL, (0, 2)), "(0, 2)", "positive whole numbers", id="sample, empty"),
    case(ShapeError, lambda: sd.sample(MODEL, (4, 2.5)), "(4, 2.5)", "(batch, *event)", id="sample, fraction"),
    case(ShapeError, lambda: sd.sample(MODEL, ()), "(batch, *event)", "got ()", id="sample, no batch"),
    case(ShapeError, lambda: sd.sample(MODEL, 64), "64", "(batch, *event)", id="sample, a number for a shape"),
    case(
        ShapeError,
        lambda: sd.sample(MODEL, (4, 2), x_init=x(4, 3)),
        "x_init has shape (4, 3)",
        "(4, 2)",
        id="x_init of another shape",
    ),
    case(
        ShapeError, lambda: sd.sample(MODEL, (4, 2), dtype=torch.int64), "torch.int64", "floating", id="sample, dtype"
    ),
    case(ShapeError, lambda: sd.encode(MODEL, torch.zeros(4, 2).long()), "torch.int64", "x.double()", id="encode"),
    case(ShapeError, lambda: sd.log_prob(MODEL, torch.zeros(4, 2).long()), "torch.int64", "x.float()", id="log_prob"),
    case(
        ShapeError,
        lambda: sd.losses.denoising(MODEL, x(4, 2), t=torch.rand(3)),
        "shape (4,)",
        "got (3,)",
        id="denoising, times",
    ),
    case(
        ShapeError,
        lambda: sd.losses.denoising(MODEL, x(4, 2), noise=x(4, 1)),
        "(4, 1)",
        "(4, 2)",
        id="denoising, noise",
    ),
    case(ShapeError, lambda: sd.losses.denoising(MODEL, x(4, 2).long()), "torch.int64", "x0.float()", id="denoising"),
    case(ShapeError, lambda: fit(data=torch.zeros(9, 2).long()), "torch.int64", "data.float()", id="fit, integers"),
    case(ShapeError, lambda: fit(data=[torch.zeros(2).long()] * 9), "torch.int64", "data.float()", id="fit, dataset"),
    case(
        ShapeError,
        lambda: fit(labelled(), condition=torch.zeros(8).long()),
        "each of the 9 rows",
        "got 8",
        id="fit, condition of another length",
    ),
    case(
        ShapeError,
        lambda: fit(labelled(), condition=torch.tensor(1)),
        "each of the 9 rows",
        id="fit, condition without rows",
    ),
    case(
        ShapeError,
        lambda: sd.sample(labelled(), (4, 2), steps=2, condition=torch.zeros(3).long()),
        "3",
        "4",
        "condition",
        id="sample, condition of another length",
    ),
    case(
        ShapeError,
        lambda: sd.bits_per_dim(MODEL, x(4, 2), levels=4, dequantize="uniform"),
        "float64",
        "integers",
        id="codes",
    ),
    case(ShapeError, lambda: sd.metrics.energy_distance(x(4, 2), x(4, 3)), "(4, 2)", "(4, 3)", id="metrics"),
    case(ShapeError, lambda: sd.networks.MLP((3,))(x(4, 2), x(4)), "(3,)", "(2,)", id="MLP"),
    case(
        ShapeError,
        lambda: sd.exact.GaussianMixture(x(3) + 1, x(2, 2), x(2) + 1),
        "(2,), one per mean",
        "(3,)",
        id="mixture, weights",
    ),
    case(
        ShapeError,
        lambda: sd.exact.Gaussian(x(2), x(3, 3)),
        "(1, 2, 2)",
        "(1, 3, 3)",
        "LowRank",
        id="Gaussian, covariance",
    ),
    case(
        ShapeError,
        lambda: sd.exact.GaussianMixture(x(2) + 1, x(2, 4), sd.exact.LowRank(x(2, 3, 1), 0.1)),
        "(2, 4, r)",
        "(2, 3, 1)",
        id="LowRank factors",
    ),
]

TIMES = [
    case(TimeError, lambda: VP.alpha(1.5), "1.5", "[0, 1]", "VP(", id="alpha, late"),
    case(TimeError, lambda: VP.sigma(-0.25), "-0.25", "[0, 1]", id="sigma, early"),
    case(TimeError, lambda: VP.log_snr(float("nan")), "nan", "[0, 1]", id="log_snr, NaN"),
    case(TimeError, lambda: VP.perturb(torch.tensor([0.5, 7.0]), x(2, 1), x(2, 1)), "7", "[0, 1]", id="perturb, a row"),
    case(TimeError, lambda: MODEL.denoised(1.25, x(4, 2)), "1.25", "[0, 1]", id="denoised, late"),
    case(TimeError, lambda: MODEL.velocity(1.25, x(4, 2)), "1.25", "[0, 1]", id="velocity, late"),
    case(TimeError, lambda: MODEL.score(1.25, x(4, 2)), "1.25", "[0, 1]", id="score, late"),
    case(
        TimeError,
        lambda: sd.ScoreModel(lambda x, t: -x, VP, "score").score(1.25, x(4, 2)),
        "1.25",
        "[0, 1]",
        id="score of a score network, late",
    ),
    case(TimeError, lambda: VP.time(-50.0), "-50", "fall from", "VP(", id="a log-SNR that no time has"),
    case(
        TimeError,
        lambda: rates(lambda t: -1 + 0 * t, lambda t: 1 + 0 * t).time(-99.0),
        "-99",
        "fall from",
        id="by bisection",
    ),
    case(TimeError, lambda: VP.transition(0.7, 0.3), "0.7", "0.3", "s <= t", id="transition backwards"),
    case(TimeError, lambda: VP.posterior(0.7, 0.3, x(4, 2), x(4, 2)), "0.7", "0.3", "s <= t", id="posterior backwards"),
    case(
        TimeError,
        lambda: sd.sample(MODEL, (4, 2), times=[1.0, 0.5, 0.6]),
        "strictly decreasing",
        "times[1] = 0.5",
        "times[2] = 0.6",
        id="sample, rising grid",
    ),
    case(
        TimeError,
        lambda: sd.sample(MODEL, (4, 2), times=[1.0, 0.5, 0.5, 0.1]),
        "strictly decreasing",
        "times[1] = 0.5",
        id="sample, standing grid",
    ),
    case(TimeError, lambda: sd.sample(MODEL, (4, 2), times=[0.5, float("nan")]), "decreasing", "nan", id="sample, NaN"),
    case(TimeError, lambda: sd.sample(MODEL, (4, 2), times=[1.0]), "at least two", "(1,)", id="sample, one time"),
    case(TimeError, lambda: sd.sample(MODEL, (4, 2), times=[1.2, 0.5]), "times = 1.2", "[0, 1]", id="sample, late"),
    case(TimeError, lambda: sd.sample(MODEL, (4, 2), times=[1.0, -0.1]), "-0.1", "[0, 1]", id="sample, early"),
    case(
        TimeError,
        lambda: sd.encode(MODEL, x(4, 2), times=[1.0, 0.5]),
        "strictly increasing",
        "times[0] = 1",
        "times[1] = 0.5",
        id="encode, falling grid",
    ),
    case(TimeError, lambda: sd.log_prob(MODEL, x(4, 2), times=[0.9, 0.1]), "increasing", "0.9", id="log_prob, falling"),
    case(
        TimeError, lambda: VP.simulate(x(4, 2), torch.tensor([0.5, 0.1])), "increasing", "0.5", id="simulate, falling"
    ),
    case(TimeError, lambda: VP.simulate(x(4, 2), torch.tensor([0.5, 1.5])), "1.5", "[0, 1]", id="simulate, late"),
    case(
        TimeError, lambda: VP.simulate(x(4, 2), x(2, 2)), "at least two times", "(2, 2)", id="simulate, a grid of grids"
    ),
    case(TimeError, lambda: sd.sample(MODEL, (4, 2), t_min=1.5), "t_min = 1.5", "[0, 1)", id="sample, t_min late"),
    case(TimeError, lambda: grids.uniform(VP, 3, t_min=-0.5), "t_min = -0.5", "[0, 1)", id="grid, t_min early"),
    case(TimeError, lambda: sd.BrownianPath(0, 1.0, 0.5), "t0 < t1", "t0 = 1", "t1 = 0.5", id="path, reversed"),
    case(
        TimeError,
        lambda: sd.sample(MODEL, (4, 2), steps=3, solver=sd.EulerMaruyama(), noise=sd.BrownianPath(0, 0.0, 0.5)),
        "[0, 0.5]",
        "t = 1",
        id="path that is too short for the solve",
    ),
]

OPTIONS = [
    case(OptionError, lambda: sd.ScoreModel(net, VP, "scor"), "'scor'", "'score'", "'edm'", id="prediction"),
    case(OptionError, lambda: MODEL.view("scor", 0.5, x(4, 2)), "'scor'", "'score'", id="view"),
    case(OptionError, lambda: sd.ScoreModel(3, VP), "network(x, t)", "int", id="network"),
    case(
        OptionError,
        lambda: sd.ScoreModel(net, VP, "edm", sigma_data=0.0),
        "sigma_data",
        "0.0",
        "positive",
        id="sigma_data",
    ),
    case(OptionError, lambda: sd.losses.denoising(MODEL, x(4, 2), weighting="snrr"), "'snrr'", "'snr'", id="weighting"),
    case(OptionError, lambda: fit(weighting="snrr"), "'snrr'", "'min_snr'", id="fit, weighting"),
    case(OptionError, lambda: fit(MODEL), "torch.nn.Module", "_ExactNetwork", id="fit, network"),
    case(OptionError, lambda: fit(steps=-1), "steps = -1", ">= 1", id="fit, steps"),
    case(OptionError, lambda: fit(batch_size=0), "batch_size = 0", ">= 1", id="fit, batch_size"),
    case(OptionError, lambda: fit(ema=1.0), "ema = 1.0", "ema < 1", id="fit, ema"),
    case(OptionError, lambda: fit(checkpoint_every=0), "checkpoint_every = 0", ">= 1", id="fit, checkpoint_every"),
    case(OptionError, lambda: fit(clip=-1.0), "clip", "-1", id="fit, negative clip (would climb the loss)"),
    case((OptionError, ShapeError), lambda: fit(data=torch.zeros(0, 2)), "0", "row", id="fit, no rows"),
    case(OptionError, lambda: fit(data=3), "int", "(n, *event)", id="fit, data"),
    case(OptionError, lambda: fit(data=(i for i in "ab")), "generator", "map-style dataset", id="fit, stream"),
    case(
        OptionError,
        lambda: fit(data=[torch.zeros(2)] * 9, condition=torch.zeros(9)),
        "(event, condition)",
        id="fit, dataset and condition",
    ),
    case(
        OptionError,
        lambda: sd.fit(sd.ScoreModel(nn.Identity(), VP), x(9, 2), steps=1, progress=False),
        "Identity",
        "parameters",
        id="fit, nothing to train",
    ),
    case(OptionError, lambda: sd.save(MODEL, "nowhere"), "torch.nn.Module", "_ExactNetwork", id="save"),
    case(
        OptionError, lambda: sd.sample(MODEL, (4, 2), steps=-3), "-3", "whole number of steps >= 1", id="negative steps"
    ),
    case(OptionError, lambda: sd.sample(MODEL, (4, 2), steps=0), "0", ">= 1", id="no steps"),
    case(OptionError, lambda: sd.sample(MODEL, (4, 2), steps=2.5), "2.5", "whole number", id="steps and a half"),
    case(
        OptionError,
        lambda: sd.sample(MODEL, (4, 2), steps=3, times=[1.0, 0.1]),
        "times=",
        "steps=",
        id="steps and times",
    ),
    case(
        OptionError,
        lambda: sd.sample(MODEL, (4, 2), t_min=0.1, times=[1.0, 0.1]),
        "times=",
        "t_min=",
        id="t_min and times",
    ),
    case(
        OptionError,
        lambda: sd.sample(MODEL, (4, 2), seed=3, noise=sd.RowNoise(3)),
        "seed=",
        "noise=",
        "not both",
        id="seed and noise",
    ),
    case(
        OptionError, lambda: sd.sample(MODEL, (4, 2), final="denoised"), "'denoised'", "'denoise'", "'none'", id="final"
    ),
    case(OptionError, lambda: sd.sample(MODEL, (4, 2), solver="ddim"), "'ddim'", "DDIM()", id="solver"),
    case(OptionError, lambda: sd.encode(MODEL, x(4, 2), solver=sd.DDIM), "DDIM", "Solver", id="solver that is a class"),
    case(
        OptionError,
        lambda: sd.log_prob(MODEL, x(4, 2), solver="dopri5"),
        "'dopri5'",
        "TorchDiffEq()",
        id="log_prob, solver",
    ),
    case(OptionError, lambda: sd.sample(net, (4, 2)), "ScoreModel", "function", id="model"),
    case(OptionError, lambda: sd.sample(MODEL, (4, 2), batch_size=0), "batch_size", "0", "at least 1", id="batch_size"),
    case(OptionError, lambda: sd.TorchDiffEq("dopri6"), "'dopri6'", "'dopri5'", "'rk4'", id="TorchDiffEq, method"),
    case(OptionError, lambda: sd.TorchDiffEq(rtol=0.0), "rtol = 0.0", "rtol > 0", id="TorchDiffEq, rtol"),
    case(OptionError, lambda: sd.TorchSDE("srkk"), "'srkk'", "'srk'", id="TorchSDE, method"),
    case(OptionError, lambda: sd.DDIM(eta=-0.5), "eta >= 0", "-0.5", id="eta"),
    case(
        OptionError,
        lambda: sd.sample(MODEL, (4, 2), steps=3, solver=sd.DDIM(eta=3.0)),
        "eta = 3",
        "eta <= 1",
        "more steps",
        id="eta that asks for too much noise",
    ),
    case(OptionError, lambda: sd.DDPM("small"), "'small'", "'posterior'", "'beta'", id="DDPM, variance"),
    case(OptionError, lambda: sd.DDPM(noise_level=0.5), "0.5", "DDIM(eta=...)", id="DDPM, noise level"),
    case(OptionError, lambda: sd.Heun(churn=-1.0), "churn >= 0", "-1.0", id="churn"),
    case(OptionError, lambda: sd.Langevin(snr=0.0), "snr > 0", "snr = 0.0", id="Langevin, snr"),
    case(OptionError, lambda: sd.Langevin(steps=0), "steps >= 1", "steps = 0", id="Langevin, steps"),
    case(OptionError, lambda: sd.PredictorCorrector("euler"), "'euler'", "EulerMaruyama()", id="predictor"),
    case(OptionError, lambda: sd.PredictorCorrector(sd.DDIM(), 3), "Langevin(...)", "3", id="corrector"),
    case(OptionError, lambda: sd.Reverse(MODEL, -1.0), "noise_level", ">= 0", "-1.0", id="noise level"),
    case(OptionError, lambda: sd.Reverse(MODEL, float("nan")), ">= 0", "nan", id="noise level NaN"),
    case(
        OptionError,
        lambda: sd.sample(MODEL, (4, 2), solver=sd.EulerMaruyama(noise_level=-0.5)),
        "noise_level",
        "-0.5",
        id="noise level of a solver",
    ),
    case(
        OptionError,
        lambda: sd.log_prob(MODEL, x(4, 2), divergence="hutch"),
        "'hutch'",
        "'exact'",
        "Hutchinson(",
        id="divergence",
    ),
    case(OptionError, lambda: sd.Hutchinson(probes=0), "at least one", "0", id="probes"),
    case(
        OptionError,
        lambda: sd.Hutchinson(distribution="cauchy"),
        "'cauchy'",
        "'rademacher'",
        id="distribution of probes",
    ),
    case(
        OptionError,
        lambda: sd.bits_per_dim(MODEL, codes(1), levels=4, dequantize="normal"),
        "'normal'",
        "'uniform'",
        id="dequantisation",
    ),
    case(
        OptionError,
        lambda: sd.bits_per_dim(MODEL, codes(1, 4), levels=4, dequantize="uniform"),
        "0..3",
        "1..4",
        id="codes too large",
    ),
    case(
        OptionError,
        lambda: sd.bits_per_dim(MODEL, codes(-1, 2), levels=4, dequantize="uniform"),
        "0..3",
        "-1..2",
        id="negative codes",
    ),
    case(
        OptionError,
        lambda: sd.bits_per_dim(MODEL, codes(1, 2), levels=4, dequantize="uniform", samples=0),
        "samples",
        "0",
        id="no dequantisation samples",
    ),
    case(
        OptionError,
        lambda: sd.bits_per_dim(LINE, codes(1, 2), levels=4, dequantize="uniform", interval=(1.0, -1.0)),
        "interval",
        "1",
        "-1",
        id="reversed interval",
    ),
    case(OptionError, lambda: grids.uniform(VP, 0), "whole number of steps >= 1", "0", id="grid, steps"),
    case(OptionError, lambda: grids.karras(VP, 3, rho=0.0), "rho > 0", "0.0", id="grid, rho"),
    case(OptionError, lambda: sd.VP(beta_min=-1.0), "beta_min", "-1.0", id="VP"),
    case(OptionError, lambda: sd.VP(t_min=0.5, t_max=0.2), "t_min < t_max", "[0.5, 0.2]", id="span"),
    case(OptionError, lambda: sd.SubVP(beta_max=0.01), "beta_max", "0.01", id="SubVP"),
    case(OptionError, lambda: sd.VE(sigma_min=0.0), "sigma_min < sigma_max", "0.0", id="VE"),
    case(OptionError, lambda: sd.EDM(sigma_max=0.001), "sigma_min < sigma_max", "0.001", id="EDM"),
    case(OptionError, lambda: sd.CosineVP(offset=0.0), "offset > 0", "0.0", id="CosineVP"),
    case(OptionError, lambda: sd.CosineVP(t_max=1.5), "t_max <= 1", "1.5", id="CosineVP, span"),
    case(OptionError, lambda: sd.SigmoidVP(ramp=0.0), "ramp > 0", "0.0", id="SigmoidVP"),
    case(OptionError, lambda: sd.RectifiedFlow(t_max=1.5), "t_max <= 1", "1.5", id="RectifiedFlow"),
    case(OptionError, lambda: sd.DiscreteVP([0.1, 1.2]), "(0, 1)", "1.2", id="DiscreteVP"),
    case(OptionError, lambda: sd.exact.Gaussian(x(2), -1.0), "positive definite", "-1", id="covariance, negative"),
    case(
        OptionError,
        lambda: sd.exact.Gaussian(x(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        "must be symmetric",
        id="covariance, lopsided",
    ),
    case(
        OptionError,
        lambda: sd.exact.GaussianMixture(torch.tensor([1.0, -0.5]), x(2, 2), x(2) + 1),
        "weights must be positive",
        "-0.5",
        id="weights, negative",
    ),
]

PROCESSES = [
    case(
        SDEError,
        lambda: sd.ScoreModel(net, scales(lambda t: 0.5 - t, lambda t: t)),
        "alpha must be positive",
        "Custom",
        "= -0.",
        id="alpha that turns negative",
    ),
    case(
        SDEError,
        lambda: sd.as_linear(scales(lambda t: 1 + 0 * t, lambda t: 0.2 - t)),
        "sigma must be positive",
        "Custom",
        id="sigma that turns negative",
    ),
    case(
        SDEError,
        lambda: sd.as_linear(scales(lambda t: t * float("nan"), lambda t: t)),
        "alpha must be positive and finite",
        "nan",
        id="alpha that is NaN",
    ),
    case(
        SDEError,
        lambda: sd.as_linear(scales(lambda t: 1 + 0 * t, lambda t: t * float("inf"))),
        "sigma must be positive and finite",
        "inf",
        id="sigma that is infinite",
    ),
    case(
        SDEError,
        lambda: sd.ScoreModel(net, scales(lambda t: 1 + 0 * t, lambda t: 0.1 + (6 * t).sin() ** 2)),
        "must fall strictly",
        "its logarithm goes from",
        "at t = 0.2",
        id="SNR that rises",
    ),
    case(
        SDEError,
        lambda: sd.as_linear(scales(lambda t: 1 + 0 * t, lambda t: 1 + 0 * t)),
        "must fall strictly",
        "Custom",
        id="SNR that stands",
    ),
    case(
        SDEError,
        lambda: sd.as_linear(rates(lambda t: -1 / (t - 0.5), lambda t: (t - 0.5).sqrt())),
        "diffusion is not finite at t = 0",
        "write scales(t)",
        id="rates that are not finite",
    ),
    case(
        SDEError,
        lambda: type("Neither", (sd.LinearSDE,), {}),
        "Neither",
        "scales(t) -> (alpha, sigma)",
        "rates(t) -> (drift_rate, diffusion)",
        id="a linear SDE without scales and rates",
    ),
    case(
        SDEError,
        lambda: sd.ScoreModel(net, Nonlinear(), "noise"),
        "Nonlinear() is not linear",
        "prediction='noise'",
        "prediction='score'",
        id="nonlinear SDE asked for noise prediction",
    ),
    case(SDEError, lambda: sd.as_linear(Coloured()), "not linear", "diffusion is not one number", id="coloured noise"),
    case(
        SDEError, lambda: sd.as_linear(Unbroadcast()), "shape (5, 3) or (1, 1)", "Unbroadcast()", id="one event shape"
    ),
    case(SDEError, lambda: sd.VE().discretize(10), "variance-preserving", "VE(", id="discretize"),
    case(
        CheckFailure, lambda: sd.testing.check_sde(sd.VE(t_max=0.5), (lambda s: _fail(),)), "fails", "VE(", id="check"
    ),
]


def _fail():
    raise CheckFailure("something broke")


CAPABILITIES = [
    case(CapabilityError, lambda: nonlinear().noise(0.5, x(4, 2)), "Nonlinear()", "not linear", "DDIM", id="noise"),
    case(CapabilityError, lambda: nonlinear().denoised(0.5, x(4, 2)), "Nonlinear()", "not linear", id="denoised"),
    case(CapabilityError, lambda: sd.sample(nonlinear(), (4, 2)), "Nonlinear()", "x_init", "simulate", id="no prior"),
    case(
        CapabilityError,
        lambda: sd.sample(nonlinear(), (4, 2), x_init=x(4, 2), steps=2, solver=sd.DDIM(), final="none"),
        "not linear",
        "DDIM",
        id="nonlinear SDE and a table",
    ),
    case(
        CapabilityError,
        lambda: sd.encode(MODEL, x(4, 2), solver=sd.EulerMaruyama()),
        "EulerMaruyama(noise_level=1.0)",
        "TorchDiffEq()",
        id="encode with a noisy solver",
    ),
    case(
        CapabilityError,
        lambda: sd.log_prob(MODEL, x(4, 2), solver=sd.TorchSDE()),
        "TorchSDE(",
        "Heun()",
        id="log_prob with a noisy solver",
    ),
    case(
        CapabilityError,
        lambda: sd.log_prob(MODEL, x(4, 2), solver=sd.DDIM()),
        "DDIM",
        "prediction",
        "TorchDiffEq",
        id="log_prob with a table",
    ),
    case(
        CapabilityError,
        lambda: list(
            sd.TorchDiffEq().solve(sd.Reverse(MODEL, 1.0), x(4, 2), grids.uniform(VP, 3), sd.RowNoise(0).open())
        ),
        "TorchDiffEq",
        "noise_level=0",
        "TorchSDE",
        id="ODE solver given noise",
    ),
    case(
        CapabilityError,
        lambda: sd.Heun().start(sd.Reverse(MODEL, 0.5), x(4, 2), grids.uniform(VP, 3), sd.RowNoise(0).open()),
        "Heun",
        "noise_level=0",
        "EulerMaruyama",
        id="Heun given noise",
    ),
    case(
        CapabilityError,
        lambda: sd.DDPM().start(VP, x(4, 2), grids.uniform(VP, 3), sd.RowNoise(0).open()),
        "DDPM",
        "Reverse(model, ...)",
        "got VP",
        "EulerMaruyama",
        id="table solver given another process",
    ),
    case(
        CapabilityError,
        lambda: sd.sample(MODEL, (4, 2), steps=2, solver=sd.PredictorCorrector(sd.TorchDiffEq())),
        "TorchDiffEq",
        "no single steps",
        id="corrector on an adaptive solver",
    ),
    case(CapabilityError, lambda: sd.TorchSDE(adaptive=True), "adaptive", "steps=", id="TorchSDE, adaptive"),
    case(
        CapabilityError,
        lambda: sd.sample(MODEL, (4, 2), steps=2, solver=sd.TorchSDE("srk"), noise=sd.BrownianPath(0, 0.0, 1.0)),
        "time integral",
        "seed=",
        "'euler'",
        id="srk on a path",
    ),
    case(
        CapabilityError,
        lambda: sd.BrownianPath(0, 0.0, 1.0).open().value(x(2, 1), torch.rand(2)),
        "one time at a time",
        "RowNoise",
        id="path with a time per row",
    ),
    case(CheckpointError, lambda: sd.load("no/such/folder"), "no/such/folder", "no checkpoint", id="no checkpoint"),
]


@pytest.mark.parametrize(("error", "call", "says"), SHAPES + TIMES + OPTIONS + PROCESSES + CAPABILITIES)
def test_bad_input_gets_a_sentence(error, call, says):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in says:
        assert part in message, f"{part!r} is missing from: {message}"
    assert message.endswith((".", ")", "]")) or "fails" in message, "a message is a sentence"


def test_every_error_is_the_library_s_and_the_built_in_one_that_others_would_catch():
    for error, builtin in (
        (ShapeError, ValueError),
        (TimeError, ValueError),
        (OptionError, ValueError),
        (SDEError, ValueError),
        (CapabilityError, TypeError),
        (DivergenceError, ArithmeticError),
        (CheckpointError, OSError),
        (MissingExtraError, ImportError),
        (CheckFailure, AssertionError),
    ):
        assert issubclass(error, sd.SdediffError)
        assert issubclass(error, builtin)


# A network that fails


class Poisoned:
    """A network whose output is NaN in some rows of the whole batch from some time on."""

    def __init__(self, below, rows, value=float("nan")):
        self.below, self.rows, self.value = below, rows, value

    def __call__(self, x, t):
        marks = x.new_zeros(x.shape)
        for row in self.rows:
            marks[(x[:, -1] - row).abs() < 0.25] = self.value
        return torch.where(t[0] < self.below, marks, x.new_zeros(x.shape))


def poisoned(below, rows, value=float("nan")):
    """VE hardly moves the last entry when the noise is said to be zero: it carries the number of its row."""
    return sd.ScoreModel(Poisoned(below, rows, value), sd.VE(sigma_max=1.0))


def numbered(n):
    return torch.stack([torch.zeros(n, dtype=F64), torch.arange(n, dtype=F64)], dim=1)


GRID = [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("batch_size", [None, 2, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "solver", [sd.DDIM(), sd.Heun(), sd.EulerMaruyama(noise_level=0), sd.TorchSDE(noise_level=0.0)]
)
def test_a_network_that_fails_during_sampling_is_located_by_step_time_and_rows(solver, value, batch_size):
    """Below t = 0.6 the step from 0.5 to 0.25, number 2, spoils the state; Heun looks ahead: a step earlier."""
    model = poisoned(0.6, (1, 4), value)
    with pytest.raises(DivergenceError) as caught:
        sd.sample(model, (6, 2), x_init=numbered(6), times=GRID, solver=solver, batch_size=batch_size, seed=0)
    early = isinstance(solver, sd.Heun)
    step, time = (1, 0.5) if early else (2, 0.25)
    rows = [1, 4] if batch_size is None else [1]  # the first chunk that fails is the one that is named
    assert (caught.value.step, caught.value.time, caught.value.rows) == (step, time, rows)
    assert f"step {step}, t = {time:g}, rows {', '.join(map(str, rows))}." in str(caught.value)
    assert "Check the network's output" in str(caught.value)


def test_rows_of_a_later_chunk_are_counted_from_the_start_of_the_batch():
    for solver in (sd.DDIM(), sd.TorchDiffEq()):
        with pytest.raises(DivergenceError) as caught:
            sd.sample(poisoned(0.6, (5,)), (6, 2), x_init=numbered(6), times=GRID, solver=solver, batch_size=2)
        assert caught.value.rows == [5]


def test_an_adaptive_solver_names_time_and_rows():
    with pytest.raises(DivergenceError, match=r"The drift is NaN or infinite at t = 0\.\d+, rows 1, 4\.") as caught:
        sd.sample(poisoned(0.6, (1, 4)), (6, 2), x_init=numbered(6), times=GRID, solver=sd.TorchDiffEq())
    assert caught.value.step is None
    assert caught.value.time < 0.6
    assert caught.value.rows == [1, 4]


def test_a_failure_in_the_final_denoising_is_named_as_the_result():
    with pytest.raises(DivergenceError, match=r"The result is NaN or infinite at t = 0, rows 2\."):
        sd.sample(poisoned(0.1, (2,)), (4, 2), x_init=numbered(4), times=GRID, solver=sd.DDIM())


def test_a_bad_start_is_named_as_the_initial_state():
    start = numbered(4)
    start[3, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"The initial state is NaN or infinite at t = 1, rows 3\."):
        sd.sample(poisoned(0.0, ()), (4, 2), x_init=start, times=GRID)


def test_many_bad_rows_are_counted_and_the_first_are_shown():
    with pytest.raises(DivergenceError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(12 in all\)") as caught:
        sd.sample(poisoned(0.6, range(12)), (12, 2), x_init=numbered(12), times=GRID)
    assert caught.value.rows == list(range(12))


def test_encode_locates_a_network_that_fails():
    with pytest.raises(DivergenceError) as caught:
        sd.encode(poisoned(0.6, (1,)), numbered(3), times=GRID[::-1], solver=sd.DDIM())
    assert (caught.value.step, caught.value.rows) == (0, [1])


@pytest.mark.parametrize("solver", [sd.TorchDiffEq(), sd.Heun(), sd.EulerMaruyama(noise_level=0)])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_prob_locates_a_network_that_fails(solver, batch_size):
    """A likelihood that is silently NaN would spoil an average over a whole test set."""
    times = torch.tensor(GRID[::-1], dtype=F64)
    with pytest.raises(DivergenceError) as caught:
        sd.log_prob(poisoned(0.6, (3,)), numbered(4), times=times, solver=solver, batch_size=batch_size)
    assert caught.value.rows == [3]


# What is not installed


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'sdediff[diffusers]'")):
        sd.networks.UNet()


def test_strategies_without_hypothesis_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingExtraError, match=r"'hypothesis'.*pip install 'sdediff\[test\]'"):
        _ = sd.testing.linear_sdes


def test_an_unknown_name_of_the_testing_module_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = sd.testing.no_such_thing


@pytest.mark.parametrize("make", [lambda: sd.RowNoise(1.5), lambda: sd.BrownianPath("a", 0.0, 1.0)])
def test_a_seed_that_is_no_whole_number_is_refused(make):
    with pytest.raises(OptionError, match="whole number"):
        make()
