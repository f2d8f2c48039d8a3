"""Bits per dimension against the probabilities of bins that are known exactly, and the bounds that they obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform

import sdediff as sd
from sdediff import bits, dequantize

F64 = torch.float64


def mixture(event):
    """Two components that differ in every entry, of diagonal covariance."""
    means = torch.tensor([[-0.5, 0.2], [0.4, -0.3]], dtype=F64)[:, :event]
    variances = torch.tensor([[0.02, 0.05], [0.04, 0.02]], dtype=F64)[:, :event]
    return sd.exact.GaussianMixture(torch.tensor([0.3, 0.7]), means, variances), means, variances


def all_codes(levels, event):
    return torch.cartesian_prod(*[torch.arange(levels)] * event).reshape(-1, event)


def probabilities(codes, edges, alpha=1.0, sigma=0.0, event=2):
    """Of the bins `alpha [edges[c], edges[c + 1]]` under the mixture blurred by `(alpha, sigma)`, `(batch,)`."""
    _, means, variances = mixture(event)
    deviations = (alpha**2 * variances + sigma**2).sqrt()
    below, above = (
        torch.special.ndtr((alpha * edges[codes + k][:, None] - alpha * means) / deviations) for k in (0, 1)
    )
    return (above - below).prod(-1) @ torch.tensor([0.3, 0.7], dtype=F64)


class Rising(torch.nn.Module):
    """Points near the lower edge."""

    def forward(self, codes):
        return torch.stack([0 * codes - 0.5, 0 * codes - 0.1], dim=1)


SDE = sd.VP()
KINDS = ["uniform", "truncated_normal", "variational"]


def test_the_value_is_the_mean_of_weights_and_its_error_that_of_the_delta_method():
    log_weights = torch.tensor([[0.0, -900.0], [math.log(3), -900.0]], dtype=F64)
    noise = torch.tensor([[0.1, 0.0], [0.3, 0.2]], dtype=F64)
    value, stderr, bias = bits._combined(log_weights, noise, random=True)
    torch.testing.assert_close(value, torch.tensor([math.log(2), -900.0], dtype=F64))
    torch.testing.assert_close(stderr, torch.tensor([0.5, 0.0], dtype=F64))
    torch.testing.assert_close(bias, torch.tensor([(0.25 * 0.01 + 0.75 * 0.09) / 2, 0.01], dtype=F64))
    value, stderr, bias = bits._combined(log_weights[1:], noise[1:], random=True)
    assert torch.equal(value, log_weights[1])
    assert stderr.isnan().all()
    assert not bias.any()
    assert torch.equal(bits._combined(log_weights[1:], noise[1:], random=False)[1], noise[1])


def test_entries_samples_and_calls_are_counted():
    """The covariance is not diagonal, so that probes err."""
    target = sd.exact.Gaussian(torch.zeros(2, 3, dtype=F64), 0.1 * torch.eye(6, dtype=F64) + 0.1)
    codes = torch.full((4, 2, 3), 5)
    options = {"levels": 16, "seed": 0, "divergence": sd.Hutchinson(3)}
    once, twice = (sd.bits_per_dim(target.model(SDE), codes, samples=k, **options) for k in (1, 2))
    assert once.entries == 6
    assert once.stderr.isnan().all()
    assert not once.probe_bias.any()
    torch.testing.assert_close(twice.log_weights[:1], once.log_weights)
    assert (twice.probe_bias > 1e-6).all()
    assert twice.nfe > 1.5 * once.nfe
    same_points = sd.bits_per_dim(target.model(SDE), codes, samples=2, dequantize=Edge(), **options).log_weights
    assert ((same_points[0] - same_points[1]).abs() > 1e-3).all(), "probes are fresh"
    assert math.isnan(sd.bits_per_dim(target.model(SDE), codes[:1], **options).mean_stderr)
    given = twice.log_weights.logsumexp(0) - math.log(2)
    torch.testing.assert_close(twice.nats, given)
    torch.testing.assert_close(twice.value, -given / 6 / math.log(2))
    probes = sd.bits_per_dim(target.model(SDE), codes, dequantize=None, **options)
    assert (probes.stderr > 1e-3).all(), "without dequantisation they are those of the probes"


def test_uniform_bits_exceed_those_at_the_centres_by_the_curvature_of_a_gaussian():
    """Of N(0, s^2), `E[x^2] / (2 s^2)` of x uniform in `[-w/2, w/2]` is `w^2 / (24 s^2)` nats."""
    target = sd.exact.Gaussian(torch.zeros(1, dtype=F64), 0.2)
    codes = torch.ones(4096, 1, dtype=torch.long)
    options = {"levels": 3, "seed": 0, "prior": target.marginal(SDE, 1.0)}
    uniform = sd.bits_per_dim(target.model(SDE), codes, **options)
    centres = sd.bits_per_dim(target.model(SDE), codes[:1], dequantize=None, **options)
    density = math.log(2 / 3) - math.log(2 * math.pi * 0.2) / 2
    assert centres.mean == pytest.approx(-density / math.log(2), abs=1e-3)
    expected = (2 / 3) ** 2 / (24 * 0.2) / math.log(2)
    assert uniform.mean - centres.mean == pytest.approx(expected, abs=4 * uniform.mean_stderr + 1e-3)
    assert uniform.mean_stderr < 0.04 * expected


# Where the bins lie.


@pytest.mark.parametrize("kind", [*KINDS[:2], dequantize.Variational(Rising()), None])
def test_an_interval_is_an_affine_transform_and_codes_may_run_backwards(kind):
    target = mixture(2)[0]
    codes = torch.randint(0, 8, (5, 2), generator=torch.Generator().manual_seed(0))
    options = {"levels": 8, "dequantize": kind, "seed": 0, "steps": 20}
    plain = sd.bits_per_dim(target.model(SDE), codes, interval=(-1.5, 2.5), **options)
    moved = sd.bits_per_dim(target.model(SDE), codes, transform=AffineTransform(-1.5, 0.5), **options)
    assert torch.equal(plain.value, moved.value)
    assert "8 levels in [-1.5, 2.5]" in plain.protocol
    assert "8 levels in AffineTransform()" in moved.protocol
    mirrored = sd.exact.GaussianMixture(torch.tensor([0.3, 0.7]), -mixture(2)[1], mixture(2)[2])
    turned = sd.bits_per_dim(mirrored.model(SDE), codes, transform=AffineTransform(1.5, -0.5), **options)
    if kind == "truncated_normal":  # noise is not mirrored with the bins
        assert (turned.value - plain.value).abs().max() < 2
    else:
        torch.testing.assert_close(turned.value, plain.value, rtol=0, atol=1e-6)


def test_log_prob_moves_by_the_log_determinant_and_nothing_else():
    target = mixture(2)[0]
    x = target.sample(4, seed=0)
    plain = sd.log_prob(target.model(SDE), x).value
    scaled = sd.log_prob(target.model(SDE), (x + 3) / 5, transform=AffineTransform(-3.0, 5.0)).value
    torch.testing.assert_close(scaled, plain + 2 * math.log(5), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dequantize", [*KINDS[:2], dequantize.Variational(Rising())])
def test_bits_through_a_logit_have_the_probabilities_of_its_bins(dequantize):
    """A Gaussian in the space of logits of the codes' fraction; the outer bins reach to infinity."""
    levels, draws = 5, 2000
    target = sd.exact.Gaussian(torch.tensor([0.3], dtype=F64), 1.0)
    transform = ComposeTransform([AffineTransform(0.0, 1 / levels), SigmoidTransform().inv])
    codes = torch.arange(levels)[:, None].repeat(draws, 1)
    t_min = 0.1 if dequantize == "truncated_normal" else SDE.t_min
    alpha, sigma = (1.0, 0.0)
    if dequantize == "truncated_normal":
        alpha, sigma = (s.item() for s in SDE.scales_at(torch.tensor(t_min, dtype=F64)))
    edges = torch.logit(torch.linspace(0, 1, levels + 1, dtype=F64))
    cdf = torch.special.ndtr(alpha * (edges - 0.3) / math.hypot(alpha, sigma))
    exact = cdf[1:] - cdf[:-1]
    result = sd.bits_per_dim(
        target.model(SDE), codes, levels=levels, transform=transform, dequantize=dequantize, seed=0, t_min=t_min,
        prior=target.marginal(SDE, 1.0),
    )  # fmt: skip
    ratio = (result.log_weights.reshape(draws, levels) - exact.log()).exp()
    score = (ratio.mean(0) - 1) / (ratio.std(0) / draws**0.5 + 1e-3)
    inner = slice(1, -1) if dequantize == "truncated_normal" else slice(None)  # its outer bins are cut off too early
    assert score[inner].abs().max() < 5
    assert (ratio.log().mean(0) < 4 * ratio.log().std(0) / draws**0.5).all()


# What is chosen.


def test_a_fit_beats_uniform_where_the_density_is_steep_within_bins():
    """Two levels, a Gaussian of a fifth of their width; the same random numbers. A normal fits into neither."""
    target = sd.exact.Gaussian(torch.tensor([0.1], dtype=F64), 0.04)
    codes = (target.sample(600, seed=0) > 0).long()
    options = {"levels": 2, "seed": 3, "prior": target.marginal(SDE, 1.0)}
    model = target.model(SDE)
    fitted = dequantize.Variational().fit(model, codes[300:], levels=2, steps=200, seed=0)
    uniform, learned = (sd.bits_per_dim(model, codes[:300], dequantize=kind, **options) for kind in ("uniform", fitted))
    share = torch.special.ndtr(torch.tensor(0.1 / 0.2, dtype=F64))
    probability = torch.where(codes[:300, 0] == 1, share, 1 - share)
    exact = -probability.log2().mean().item()
    assert uniform.mean - exact > 1
    assert abs(learned.mean - exact) < 0.2
    assert learned.mean - exact > -4 * (learned.value + probability.log2()).std().item() / 300**0.5


def test_the_protocol_says_what_was_done():
    target = mixture(2)[0]
    codes = torch.randint(0, 8, (3, 2), generator=torch.Generator().manual_seed(0))

    def protocol(**options):
        return sd.bits_per_dim(target.model(SDE), codes, levels=8, seed=0, steps=5, **options).protocol

    assert protocol().startswith("8 levels in [-1, 1], uniform dequantisation, 1 sample(s); method exponential Adams")
    assert "truncated normal dequantisation at t_min, 2 sample(s)" in protocol(dequantize="truncated_normal", samples=2)
    assert "tail none" in protocol(dequantize="truncated_normal")
    assert "not a bound" in protocol(dequantize=None)
    assert "not a bound" in protocol(dequantize=dequantize.Centres())
    assert "variational dequantisation, 1" in protocol(dequantize=dequantize.Variational(Rising()))
    assert "Edge() dequantisation (not a bound), 1" in protocol(dequantize=Edge())
    assert "tail none" in protocol(tail="none")


def test_the_protocol_tells_a_fit_on_the_codes_themselves(monkeypatch):
    asked = {}

    def fit(self, model, codes, **options):
        asked.update(options, codes=codes)
        return dequantize.Variational(Rising())

    monkeypatch.setattr(dequantize.Variational, "fit", fit)
    target = mixture(1)[0]
    codes = torch.arange(4)[:, None]
    result = sd.bits_per_dim(target.model(SDE), codes, levels=4, dequantize="variational", seed=0, t_min=0.01)
    assert "variational dequantisation fitted on these codes" in result.protocol
    assert asked["codes"] is codes
    assert (asked["levels"], asked["t_min"]) == (4, 0.01)


class Edge(sd.Dequantizer):
    """A dequantiser of the user's: the lower half of every bin, which misses the rest."""

    bound = False

    def __repr__(self):
        return "Edge()"

    def draw(self, bins, seed, sample):
        x, log_det = bins.at(torch.full_like(bins.codes, 0.25, dtype=F64))
        return x, -log_det


class Malformed(Edge):
    def draw(self, bins, seed, sample):
        x, log_q = super().draw(bins, seed, sample)
        return x, log_q[:1]


@pytest.mark.parametrize("kind", [*KINDS[:2], dequantize.Variational(Rising())])
def test_a_row_has_its_bits_in_any_batch_and_chunk(kind):
    target = sd.exact.Gaussian(torch.zeros(3, dtype=F64), 0.2)
    codes = torch.randint(0, 16, (9, 3), generator=torch.Generator().manual_seed(0))
    options = {"levels": 16, "dequantize": kind, "seed": 0, "samples": 2, "divergence": sd.Hutchinson(2)}
    whole = sd.bits_per_dim(target.model(SDE), codes, **options)
    chunked = sd.bits_per_dim(target.model(SDE), codes, batch_size=4, **options)
    few = sd.bits_per_dim(target.model(SDE), codes[:5], **options)
    torch.testing.assert_close(chunked.value, whole.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(few.value, whole.value[:5], rtol=0, atol=1e-10)
    torch.testing.assert_close(few.stderr, whole.stderr[:5], rtol=0, atol=1e-10)


def test_states_of_a_truncated_normal_begin_where_the_path_does():
    """Whether t_min or times say so."""
    target = mixture(1)[0]
    codes = torch.arange(4)[:, None]
    times = torch.linspace(0.1, 1.0, 80, dtype=F64)
    options = {"levels": 4, "dequantize": "truncated_normal", "seed": 0}
    first = sd.bits_per_dim(target.model(SDE), codes, times=times, **options)
    second = sd.bits_per_dim(target.model(SDE), codes, t_min=0.1, **options)
    torch.testing.assert_close(first.value, second.value, rtol=0, atol=5e-3)
    assert "t_min 0.1" in first.protocol


def test_bits_of_a_process_that_is_not_linear():
    """Its points are states at t_min."""

    class Cubic(sd.SDE):
        t_min, t_max = 0.0, 0.2

        def drift(self, t, x):
            return -(x**3)

        def diffusion(self, t, x):
            return 1.0

    model = sd.ScoreModel(lambda x, t: -x, Cubic(), "score")
    codes = torch.tensor([[1, 2], [0, 3]])
    options = {"prior": sd.exact.Gaussian(torch.zeros(2, dtype=F64), 1.0)}
    result = sd.bits_per_dim(model, codes, levels=4, seed=0, **options)
    points, log_q = dequantize.Uniform().draw(dequantize.Bins.of(model, codes, levels=4), 0, 0)
    expected = sd.log_prob(model, points.float(), **options).value - log_q
    torch.testing.assert_close(result.nats, expected)
    with pytest.raises(sd.CapabilityError, match="not linear"):
        sd.bits_per_dim(model, codes, levels=4, dequantize="truncated_normal", **options)


# Bad input

CODES = torch.ones(2, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (sd.OptionError, {"dequantize": "gaussian"}, ["'gaussian'", "'truncated_normal'", "None"]),
        (sd.OptionError, {"samples": 0}, ["samples >= 1", "samples = 0"]),
        (sd.OptionError, {"samples": 2.0}, ["samples >= 1", "2.0"]),
        (sd.OptionError, {"samples": 2, "dequantize": None}, ["samples = 1", "nothing is drawn", "samples = 2"]),
        (sd.OptionError, {"differentiable": True}, ["differentiable", "log_prob("]),
        (sd.OptionError, {"tail": "gaussian", "dequantize": "truncated_normal"}, ["states at t_min", "'gaussian'"]),
        (sd.ShapeError, {"dequantize": Malformed()}, ["Edge()", "(2,)", "(1,)"]),
        (sd.OptionError, {"levels": 1}, ["levels", "1"]),
        (sd.OptionError, {"interval": (1.0, 1.0)}, ["interval", "(1.0, 1.0)"]),
    ],
)
def test_bad_input_gets_a_sentence(error, options, words):
    with pytest.raises(error) as caught:
        sd.bits_per_dim(mixture(1)[0].model(SDE), CODES, **{"levels": 4, "seed": 0, **options})
    message = str(caught.value)
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_codes_that_are_no_codes_are_refused():
    model = mixture(1)[0].model(SDE)
    with pytest.raises(sd.ShapeError, match="integers"):
        sd.bits_per_dim(model, CODES.double(), levels=4)
    with pytest.raises(sd.ShapeError, match="integers"):
        sd.bits_per_dim(model, CODES.bool(), levels=2)
    with pytest.raises(sd.OptionError, match=r"0\.\.3; got 1\.\.4"):
        sd.bits_per_dim(model, torch.tensor([[1], [4]]), levels=4)
    with pytest.raises(sd.ShapeError, match="at least one row"):
        sd.bits_per_dim(model, CODES[:0], levels=4)


# Many draws


@pytest.mark.parametrize("event", [1, 2])
@pytest.mark.parametrize("dequantize", KINDS)
def test_importance_weighted_bits_fall_to_the_exact_code_length_from_above(dequantize, event):
    """All codes, weighted by their exact probabilities, stand for data from the model itself; 256 draws of each are
    taken as 256 / k estimates of k samples. The truncated normal needs a t_min whose noise fills the bins."""
    levels, draws = 6, 256
    target = mixture(event)[0]
    t_min = 0.02 if dequantize == "truncated_normal" else SDE.t_min
    codes = all_codes(levels, event)
    edges = torch.linspace(-1, 1, levels + 1, dtype=F64)
    scales = (1.0, 0.0)
    if dequantize == "truncated_normal":
        scales = tuple(SDE.scales_at(torch.tensor(t_min, dtype=F64)))
    exact = probabilities(codes, edges, *scales, event)
    result = sd.bits_per_dim(
        target.model(SDE), codes.repeat(draws, 1), levels=levels, dequantize=dequantize, seed=0, t_min=t_min,
        prior=target.marginal(SDE, 1.0),
    )  # fmt: skip
    weights = result.log_weights.reshape(draws, -1)
    gaps, errors = [], []
    for k in (1, 4, 16, 64):
        groups = weights.reshape(draws // k, k, -1).logsumexp(1) - math.log(k)
        rows = exact.log() - groups
        gaps.append((exact * rows.mean(0)).sum().item())
        errors.append((exact**2 * rows.var(0) / len(rows)).sum().sqrt().item())
        assert gaps[-1] > -4 * errors[-1] - 1e-3, f"a bound at k = {k}"
    if dequantize == "variational":
        assert gaps[0] < 0.03, "what was fitted is nearly exact"
    else:
        assert gaps[0] > 4 * errors[0]
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[3]) < 0.25 * gaps[0] + 4 * errors[3]
    ratio = (weights - exact.log()).exp()
    score = (ratio.mean(0) - 1) / (ratio.std(0) / draws**0.5 + 2e-3)
    assert score[exact > 1e-3].abs().max() < 5, "the weights have mean P(c)"


@pytest.mark.parametrize("dequantize", ["uniform", dequantize.Variational(Rising())])
def test_bits_of_repeated_seeds_scatter_as_the_standard_error_says(dequantize):
    target = mixture(1)[0]
    codes = torch.full((200, 1), 4)
    result = sd.bits_per_dim(
        target.model(SDE), codes, levels=6, dequantize=dequantize, seed=1, samples=16, prior=target.marginal(SDE, 1.0)
    )
    assert result.log_weights.shape == (16, 200)
    spread = result.value.std().item()
    assert result.stderr.square().mean().sqrt().item() == pytest.approx(spread, rel=0.25)
    assert result.mean_stderr == pytest.approx(spread / 200**0.5, rel=1e-12)
    exact = -probabilities(codes[:1], torch.linspace(-1, 1, 7, dtype=F64), event=1).log2().item()
    bias = spread**2 * math.log(2) / 2
    assert result.mean == pytest.approx(exact + bias, abs=5 * result.mean_stderr + 1e-3)
    torch.testing.assert_close(result.nats, -result.value * math.log(2))


@settings(max_examples=12)
@given(
    low=st.floats(-5, 5),
    width=st.floats(0.02, 3),
    levels=st.integers(2, 300),
    kind=st.sampled_from(["uniform", "truncated_normal", None]),
)
def test_bits_do_not_change_when_the_bins_move_with_the_density(low, width, levels, kind):
    """Gaussian data of deviation w around the middle of bin 1, wherever the bins are and however wide. The noise of
    t_min in the proportion of the width keeps the states of the truncated normal in the same places."""
    sde = sd.VE(sigma_min=1e-4, sigma_max=1e3)
    codes = torch.tensor([[0, 1], [1, 1]])
    target = sd.exact.Gaussian(torch.full((2,), low + 1.5 * width, dtype=F64), width**2)
    t_min = sde.time(torch.tensor(-2 * math.log(0.2 * width), dtype=F64)).item() if kind == "truncated_normal" else None
    result = sd.bits_per_dim(
        target.model(sde), codes, levels=levels, interval=(low, low + levels * width), dequantize=kind, seed=0,
        t_min=t_min, prior=target.marginal(sde, sde.t_max), atol_nats=1e-5, samples=1 if kind is None else 3,
    )  # fmt: skip
    torch.testing.assert_close(result.value, REFERENCE[kind](codes), rtol=0, atol=2e-4)


def reference(kind):
    """The same with w = 1, from the densities alone."""

    def of(codes):
        variance = 1.04 if kind == "truncated_normal" else 1.0
        density = torch.distributions.Normal(1.5, variance**0.5)
        model = sd.exact.Gaussian(torch.zeros(2, dtype=F64), 1.0).model(sd.VE(sigma_min=0.2, sigma_max=10))
        bins = dequantize.Bins.of(model, codes, levels=2, interval=(0.0, 2.0), t_min=model.sde.t_min)
        chosen = {"uniform": dequantize.Uniform, "truncated_normal": dequantize.TruncatedNormal}.get(kind)
        draws = [(chosen or dequantize.Centres)().draw(bins, 0, k) for k in range(1 if kind is None else 3)]
        weights = torch.stack([density.log_prob(x).sum(1) - log_q for x, log_q in draws])
        return -(weights.logsumexp(0) - math.log(len(draws))) / 2 / math.log(2)

    return of


REFERENCE = {kind: reference(kind) for kind in ("uniform", "truncated_normal", None)}


def test_bits_per_dim_of_uniform_bins_is_the_entropy_of_the_code():
    """Data uniform over the codes, dequantised, is uniform on [-1, 1]; a wide flat mixture models it, so that bits/dim
    approaches log2(levels). The bin width enters exactly: other intervals with scaled models give the same number."""
    levels = 8
    codes = torch.arange(levels).repeat(16)[:, None]
    centres = torch.linspace(-1, 1, 401, dtype=F64)[1::2, None]
    options = {"levels": levels, "dequantize": "uniform", "seed": 0, "solver": sd.TorchDiffEq()}
    flat = sd.exact.GaussianMixture(torch.ones(200), centres, torch.full((200,), 0.006**2))
    sde = sd.VP(t_min=1e-7)
    result = sd.bits_per_dim(flat.model(sde), codes, prior=flat.marginal(sde, 1.0), **options)
    assert result.value.mean().item() == pytest.approx(3, abs=0.03)
    wide = sd.exact.GaussianMixture(torch.ones(200), 2 * centres + 2, torch.full((200,), 0.012**2))
    again = sd.bits_per_dim(wide.model(sde), codes, prior=wide.marginal(sde, 1.0), interval=(0.0, 4.0), **options)
    torch.testing.assert_close(again.value, result.value, rtol=0, atol=5e-3)
    assert "8 levels" in result.protocol
    assert "uniform" in result.protocol


def test_bits_per_dim_is_the_log_density_in_bins_of_the_declared_width():
    target = sd.exact.Gaussian(torch.zeros(2, 3, dtype=F64), 0.2)
    sde = sd.VP()
    codes = torch.randint(0, 16, (6, 2, 3), generator=torch.Generator().manual_seed(0))
    result = sd.bits_per_dim(
        target.model(sde), codes.repeat(64, 1, 1), levels=16, dequantize="uniform", seed=1,
        prior=target.marginal(sde, 1.0),
    )  # fmt: skip
    value = result.value.reshape(64, 6)
    edges = torch.linspace(-1, 1, 17, dtype=F64)
    cell = lambda c: torch.linspace(0, 1, 201, dtype=F64) * 0.125 + edges[c][..., None]  # noqa: E731
    density = torch.distributions.Normal(0.0, 0.2**0.5).log_prob(cell(codes)).mean(-1)
    exact = -(density.sum((1, 2)) / 6 + math.log(0.125)) / math.log(2)
    assert ((value.mean(0) - exact).abs() < 5 * value.std(0) / 8 + 2e-3).all()
    assert value.std(0).max() < 0.4
