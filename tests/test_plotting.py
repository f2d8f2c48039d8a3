"""Figures: what they show, their labels, and the sentences for what cannot be drawn."""

import pytest
import torch
from matplotlib.figure import Figure

import sdediff as sd
from sdediff import plotting


def labels(figure):
    return [(ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes]


def saved(figure, tmp_path):
    """Drawing is where a figure fails; the file shows that it does not."""
    assert isinstance(figure, Figure)
    path = tmp_path / "figure.png"
    figure.savefig(path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figure


@pytest.fixture
def images():
    return torch.rand(12, 1, 8, 8) * 2 - 1


def test_forward_process_of_images_shows_the_times(images, tmp_path):
    figure = saved(plotting.forward_process(sd.VP(), images[:3], [0.0, 0.5, 1.0]), tmp_path)
    (ax,) = figure.axes
    assert ax.get_xlabel() == "time t"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.5", "1"]
    assert "VP" in ax.get_title()


def test_forward_process_repeats_with_its_seed(images):
    a, b, c = (plotting.forward_process(sd.VP(), images[:2], [0.0, 1.0], seed) for seed in (1, 1, 2))
    pictures = [figure.axes[0].images[0].get_array() for figure in (a, b, c)]
    assert (pictures[0] == pictures[1]).all()
    assert not (pictures[0] == pictures[2]).all()


def test_points_in_the_plane_become_panels(tmp_path):
    figure = saved(plotting.forward_process(sd.VP(), torch.randn(50, 2), [0.0, 0.5, 1.0]), tmp_path)
    assert [title for title, _, _ in labels(figure)] == ["t = 0", "t = 0.5", "t = 1"]
    assert labels(figure)[0][1:] == ("x₁", "x₂")


@pytest.mark.parametrize("event", [(), (1,)])
def test_numbers_become_paths_over_time(event, tmp_path):
    figure = saved(plotting.forward_process(sd.VP(), torch.randn(20, *event)), tmp_path)
    assert labels(figure)[0][1:] == ("time t", "state x")
    assert len(figure.axes[0].lines) == 20


def test_trajectories_of_a_solution(tmp_path):
    model = sd.exact.Gaussian(torch.zeros(2), torch.eye(2)).model(sd.VP())
    solution = sd.sample(model, (30, 2), steps=6, seed=0, trajectory=True)
    figure = saved(plotting.trajectories(solution, columns=4), tmp_path)
    assert labels(figure)[0][0] == "t = 1"
    assert len(figure.axes) == 4


def test_trajectories_refuse_what_has_none():
    model = sd.exact.Gaussian(torch.zeros(2), torch.eye(2)).model(sd.VP())
    with pytest.raises(sd.ShapeError, match="trajectory=True"):
        plotting.trajectories(sd.sample(model, (3, 2), steps=2, seed=0))
    with pytest.raises(sd.ShapeError, match="3 states but times of shape"):
        plotting.trajectories(torch.randn(3, 5, 2), [0.0, 1.0])
    with pytest.raises(sd.ShapeError, match=r"Only images, signals, points in the plane and numbers.*\(2, 2, 3, 4\)"):
        plotting.trajectories(torch.randn(3, 5, 2, 2, 3, 4))


def test_a_trajectory_of_every_second_step_has_the_times_that_were_kept():
    model = sd.exact.Gaussian(torch.zeros(2), torch.eye(2)).model(sd.VP())
    solution = sd.sample(model, (5, 2), solver=sd.DDIM(), times=[1.0, 0.7, 0.5, 0.2, 0.1], trajectory=2)
    assert [title for title, _, _ in labels(plotting.trajectories(solution))] == ["t = 1", "t = 0.5", "t = 0.1"]


@pytest.mark.parametrize("event", [(50,), (1, 50), (3,)])
def test_signals_become_curves_at_several_times(event, tmp_path):
    x0 = torch.randn(9, *event)
    figure = saved(plotting.forward_process(sd.VP(), x0, [0.0, 0.5, 1.0], rows=4), tmp_path)
    assert [title for title, _, _ in labels(figure)] == ["t = 0", "t = 0.5", "t = 1"]
    assert [len(ax.lines) for ax in figure.axes] == [4, 4, 4]
    for line, signal in zip(figure.axes[0].lines, x0.flatten(1), strict=False):
        assert list(line.get_xdata()) == list(range(x0[0].numel()))
        assert torch.equal(torch.from_numpy(line.get_ydata()), signal)
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim()
    assert "VP" in figure.get_suptitle()


def test_signals_of_one_and_of_several(tmp_path):
    one = saved(plotting.signals(torch.randn(9, 20), rows=2), tmp_path)
    assert labels(one) == [("Signals", "entry", "value")]
    both = plotting.signals({"data": torch.randn(9, 20), "model": torch.randn(1, 20)}, title="Two")
    assert [(ax.get_title(), len(ax.lines)) for ax in saved(both, tmp_path).axes] == [("data", 6), ("model", 1)]
    with pytest.raises(sd.ShapeError, match=r"Signals have shape \(batch, length\).*\(4, 8, 8\)"):
        plotting.signals(torch.randn(4, 8, 8))


def test_covariances_share_a_scale_in_which_zero_is_white(tmp_path):
    small, large = torch.eye(3), torch.tensor([[1.0, -5.0], [-5.0, 2.0]])
    figure = saved(plotting.covariances({"small": small, "large": large}, title="Both"), tmp_path)
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert [image.get_clim() for image in images] == [(-5, 5), (-5, 5)]
    assert images[1].get_array().tolist() == large.tolist()
    assert [ax.get_title() for ax in figure.axes[:2]] == ["small", "large"]
    with pytest.raises(sd.ShapeError, match=r"'flat' has shape \(4, 3\)"):
        plotting.covariances({"flat": torch.ones(4, 3)})


@pytest.mark.parametrize("draw", [plotting.covariances, plotting.spectra])
@pytest.mark.parametrize(
    ("matrices", "message"),
    [({}, "at least one"), ({"a": torch.eye(2), "b": torch.eye(2) / 0}, "'b' has NaN or infinite entries")],
)
def test_covariances_that_cannot_be_drawn_are_refused(draw, matrices, message):
    with pytest.raises(sd.OptionError, match=message):
        draw(matrices)


def test_spectra_fall_and_leave_out_what_is_rounding(tmp_path):
    matrices = {"a": torch.diag(torch.tensor([1.0, 4.0, 1e-9])), "b": 2 * torch.eye(3)}
    (ax,) = saved(plotting.spectra(matrices), tmp_path).axes
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3]
    assert list(ax.lines[0].get_ydata()[:2]) == [4, 1]
    assert ax.lines[0].get_ydata()[2] != ax.lines[0].get_ydata()[2]
    assert ax.get_yscale() == "log"
    with pytest.raises(sd.ShapeError, match=r"'flat' has shape \(3,\)"):
        plotting.spectra({"flat": torch.ones(3)})


def test_strips_side_by_side(images, tmp_path):
    states = images.expand(5, *images.shape)
    figure = plotting.image_frames({"one": (states, range(5)), "two": (states[:2], [0.0, 1e-4])}, columns=3, rows=2)
    assert [title for title, _, _ in labels(saved(figure, tmp_path))] == ["one", "two"]
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["0", "0.0001"]


@pytest.mark.parametrize("event", [(8, 8), (1, 8, 8), (3, 6, 4)])
def test_image_grid_takes_grey_and_colour(event, tmp_path):
    figure = saved(plotting.image_grid(torch.rand(7, *event), columns=3, title="Seven"), tmp_path)
    height, width = event[-2:]
    gap = max(1, round(width / 5))
    assert figure.axes[0].images[0].get_array().shape == (3 * (height + gap) - gap, 3 * (width + gap) - gap, 3)
    assert figure.axes[0].get_title() == "Seven"


def test_image_grid_refuses_other_shapes():
    with pytest.raises(sd.ShapeError, match=r"Images have events"):
        plotting.image_grid(torch.rand(4, 2, 8, 8))


def test_image_rows_name_their_sets(images, tmp_path):
    figure = saved(plotting.image_rows({"DDPM": images, "DDIM": images}, columns=4, title="Digits"), tmp_path)
    assert [ax.get_ylabel() for ax in figure.axes] == ["DDPM", "DDIM"]


def test_loss_curve_shows_the_running_mean(tmp_path):
    figure = saved(plotting.loss_curve([4.0, 2.0, 2.0, 2.0], window=2), tmp_path)
    each, mean = figure.axes[0].lines
    assert list(each.get_ydata()) == [4, 2, 2, 2]
    assert list(mean.get_ydata()) == [4, 3, 2, 2]
    assert labels(figure) == [("Training", "optimisation step", "loss")]
    assert figure.axes[0].get_yscale() == "log"


def test_losses_that_may_be_negative_are_seen(tmp_path):
    (ax,) = saved(plotting.loss_curve([2.0, 0.0, -1.0, -1.5], window=2), tmp_path).axes
    assert ax.get_yscale() == "linear"
    low, high = ax.get_ylim()
    assert low < -1.5 < 2 < high


def test_quality_against_nfe_draws_negative_distances_too(tmp_path):
    results = {"A": [(20, 0.01), (10, 0.1)], "B": [(5, 2.0), (50, -0.0005)]}
    figure = saved(plotting.quality_against_nfe(results, floor=(0.0003, 0.001)), tmp_path)
    (ax,) = figure.axes
    assert [line.get_label() for line in ax.lines] == ["A", "B"]
    assert list(ax.lines[0].get_xdata()) == [10, 20]
    assert "NFE" in ax.get_xlabel()
    assert "distance" in ax.get_ylabel()
    assert ax.get_ylim()[0] < -0.0005


def test_scatter_of_one_and_of_several(tmp_path):
    assert labels(saved(plotting.scatter(torch.randn(9, 2)), tmp_path)) == [("Samples", "x₁", "x₂")]
    both = plotting.scatter({"data": torch.randn(9, 2), "model": torch.randn(5, 2)}, title="Two")
    assert [title for title, _, _ in labels(saved(both, tmp_path))] == ["data", "model"]
    with pytest.raises(sd.ShapeError, match="Points in the plane"):
        plotting.scatter(torch.randn(9, 3))


def test_density_is_drawn_the_right_way_round(tmp_path):
    def log_density(x):
        return -((x[:, 0] - 2) ** 2 + x[:, 1] ** 2) * 4

    figure = saved(plotting.density_2d(log_density, resolution=31, samples=torch.zeros(2, 2)), tmp_path)
    mesh = figure.axes[0].collections[0]
    x, y = mesh.get_coordinates().reshape(-1, 2)[mesh.get_array().argmax()]
    assert (x, y) == pytest.approx((2, 0), abs=0.11)
    assert labels(figure)[0] == ("Density", "x₁", "x₂")


def test_no_state_is_left_in_pyplot(images):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plotting.image_grid(images)
    assert pyplot.get_fignums() == before


def test_a_missing_extra_is_named(monkeypatch, images):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(sd.MissingExtraError, match=r"sdediff\[plot\]"):
        plotting.image_grid(images)


def test_image_panels_stand_side_by_side_with_named_rows(images, tmp_path):
    figure = saved(plotting.image_panels({"a": images, "b": -images}, 4, rows=["0", "1", "2"]), tmp_path)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "1", "2"]
    assert list(figure.axes[0].get_yticks()) == [3.5, 13.5, 23.5]  # the middles of 8 pixels in steps of 10
    assert len(figure.axes[1].get_yticks()) == 0
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[:2] == (28, 38)
    assert torch.as_tensor(shown[10:18, 20:28, 0]).allclose(1 - (images[6, 0] + 1) / 2, atol=1e-6)  # row 1, column 2


def test_a_trade_off_draws_points_with_both_errors_and_their_labels(tmp_path):
    curves = {
        "one": [("0", (1.0, 0.1), (0.5, 0.2)), ("2", (0.7, 0.05), (0.9, 0.1))],
        "two": [("9", (0.2, 0.0), (0.3, 0.0))],
    }
    figure = saved(plotting.trade_off(curves, xlabel="x", ylabel="y", title="both"), tmp_path)
    assert labels(figure) == [("both", "x", "y")]
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    drawn = ax.containers[0]
    assert drawn[0].get_xydata().tolist() == [[1.0, 0.5], [0.7, 0.9]]
    across, up = (bar.get_segments() for bar in drawn[2])
    assert across[1].tolist() == [pytest.approx([0.65, 0.9]), pytest.approx([0.75, 0.9])]
    assert up[0].tolist() == [pytest.approx([1.0, 0.3]), pytest.approx([1.0, 0.7])]
    assert [(note.get_text(), note.xy) for note in ax.texts] == [
        ("0", (1.0, 0.5)),
        ("2", (0.7, 0.9)),
        ("9", (0.2, 0.3)),
    ]
