"""Write an SDE, get a diffusion model.

Diffusion models as continuous stochastic differential equations in PyTorch: sampling, likelihoods and training for any
linear SDE, with the samplers of the field as special cases. See the README for ten lines that show it.
"""

from sdediff import dequantize as dequantize
from sdediff import exact as exact
from sdediff import grids as grids
from sdediff import losses as losses
from sdediff import metrics as metrics
from sdediff import networks as networks
from sdediff import testing as testing
from sdediff.adapters import TorchDiffEq as TorchDiffEq
from sdediff.adapters import TorchSDE as TorchSDE
from sdediff.adaptive import Adaptive as Adaptive
from sdediff.adaptive_sde import AdaptiveStochastic as AdaptiveStochastic
from sdediff.bits import BitsPerDim as BitsPerDim
from sdediff.bits import bits_per_dim as bits_per_dim
from sdediff.calibration import Calibration as Calibration
from sdediff.calibration import calibrate as calibrate
from sdediff.denoised import clamp_denoised as clamp_denoised
from sdediff.denoised import dynamic_threshold as dynamic_threshold
from sdediff.denoised import map_denoised as map_denoised
from sdediff.dequantize import Dequantizer as Dequantizer
from sdediff.divergence import Divergence as Divergence
from sdediff.divergence import Exact as Exact
from sdediff.divergence import Hutchinson as Hutchinson
from sdediff.embedded import AdaptiveRungeKutta as AdaptiveRungeKutta
from sdediff.errors import CapabilityError as CapabilityError
from sdediff.errors import CheckFailure as CheckFailure
from sdediff.errors import CheckpointError as CheckpointError
from sdediff.errors import DivergenceError as DivergenceError
from sdediff.errors import MissingExtraError as MissingExtraError
from sdediff.errors import OptionError as OptionError
from sdediff.errors import SdediffError as SdediffError
from sdediff.errors import SDEError as SDEError
from sdediff.errors import ShapeError as ShapeError
from sdediff.errors import TimeError as TimeError
from sdediff.exponential import Exponential as Exponential
from sdediff.exponential import ExponentialRungeKutta as ExponentialRungeKutta
from sdediff.exponential import UniPC as UniPC
from sdediff.langevin import AnnealedLangevin as AnnealedLangevin
from sdediff.langevin import Corrector as Corrector
from sdediff.langevin import Langevin as Langevin
from sdediff.langevin import LangevinByNorm as LangevinByNorm
from sdediff.langevin import PredictorCorrector as PredictorCorrector
from sdediff.likelihood import LogProb as LogProb
from sdediff.likelihood import as_distribution as as_distribution
from sdediff.likelihood import log_prob as log_prob
from sdediff.likelihood import matched_prior as matched_prior
from sdediff.linear import LinearSDE as LinearSDE
from sdediff.linear import as_linear as as_linear
from sdediff.model import ScoreModel as ScoreModel
from sdediff.noise import Antithetic as Antithetic
from sdediff.noise import BrownianPath as BrownianPath
from sdediff.noise import Noise as Noise
from sdediff.noise import Recorded as Recorded
from sdediff.noise import Recorder as Recorder
from sdediff.noise import RowNoise as RowNoise
from sdediff.processes import EDM as EDM
from sdediff.processes import VE as VE
from sdediff.processes import VP as VP
from sdediff.processes import CosineVP as CosineVP
from sdediff.processes import DiscreteVP as DiscreteVP
from sdediff.processes import RectifiedFlow as RectifiedFlow
from sdediff.processes import SigmoidVP as SigmoidVP
from sdediff.processes import SubVP as SubVP
from sdediff.reverse import Reverse as Reverse
from sdediff.runge_kutta import EulerMaruyama as EulerMaruyama
from sdediff.runge_kutta import Heun as Heun
from sdediff.runge_kutta import RungeKutta as RungeKutta
from sdediff.runge_kutta import Tableau as Tableau
from sdediff.sampling import Solution as Solution
from sdediff.sampling import encode as encode
from sdediff.sampling import sample as sample
from sdediff.sde import SDE as SDE
from sdediff.shapes import over as over
from sdediff.solvers import Solver as Solver
from sdediff.stochastic import SRA1 as SRA1
from sdediff.tables import DDIM as DDIM
from sdediff.tables import DDPM as DDPM
from sdediff.training import TrainedModel as TrainedModel
from sdediff.training import fit as fit
from sdediff.training import load as load
from sdediff.training import save as save

__version__ = "0.1.0"
