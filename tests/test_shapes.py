import pytest
import torch

import sdediff as sd
from sdediff.shapes import as_time, check_state, finite_or_raise, over, per_row, sum_rows

F64 = torch.float64


def test_a_coefficient_is_laid_over_rows_never_over_columns():
    """An (8,) coefficient on an (8, 3, 8, 8) state, where plain broadcasting would fall on the last axis."""
    x = torch.ones(8, 3, 8, 8)
    c = torch.arange(8, dtype=F64)
    assert over(c, x).shape == (8, 1, 1, 1)
    assert (over(c, x) * x)[5].unique().tolist() == [5.0]
    assert over(torch.tensor(2.0), x).shape == ()
    assert over(2.5, x).item() == 2.5
    assert over(x * 2, x).shape == x.shape
    for wrong in (torch.ones(3), torch.ones(8, 1), torch.ones(1)):
        with pytest.raises(sd.ShapeError, match=r"\(8,\) for one value per row"):
            over(wrong, x)


def test_coefficients_are_cast_once_to_the_state():
    assert over(torch.ones(2, dtype=F64), torch.ones(2, 3)).dtype == torch.float32
    assert over(0.1, torch.ones(2, 3, dtype=F64)).item() == 0.1
    assert over(torch.ones(3, dtype=F64), torch.ones(3)).shape == (3,)


def test_times_become_float64_and_keep_their_value_and_gradient():
    assert as_time(0.1).dtype == F64
    assert as_time(torch.tensor(3)).item() == 3
    t = torch.tensor([0.25, 0.5], requires_grad=True)
    as_time(t).sum().backward()
    assert t.grad.tolist() == [1, 1]


def test_one_time_serves_all_rows_and_other_lengths_are_refused():
    x = torch.ones(4, 2)
    assert per_row(torch.tensor(0.5), x).tolist() == [0.5] * 4
    assert per_row(torch.arange(4.0), x).tolist() == [0, 1, 2, 3]
    with pytest.raises(sd.ShapeError, match=r"give shape \(\) or \(4,\)"):
        per_row(torch.ones(2), x)


def test_rows_are_summed_over_their_events():
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert sum_rows(x).tolist() == [15, 51]
    assert sum_rows(torch.arange(3.0)).tolist() == [0, 1, 2]


def test_states_are_floating_point_tensors_with_a_batch():
    check_state(torch.ones(2))
    for wrong, word in (([1.0], "list"), (torch.tensor(1.0), "no dimensions"), (torch.ones(2).int(), "int32")):
        with pytest.raises(sd.ShapeError, match=word):
            check_state(wrong)


def test_what_is_not_finite_is_located():
    x = torch.zeros(12, 2)
    finite_or_raise(x, "The state", step=1, time=0.5)
    x[3, 1], x[7, 0] = torch.nan, torch.inf
    with pytest.raises(sd.DivergenceError, match=r"The state is NaN or infinite at step 1, t = 0\.5, rows 3, 7\."):
        finite_or_raise(x, "The state", step=1, time=0.5)
    with pytest.raises(
        sd.DivergenceError, match=r"at t = 0\.5, rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(12 in all\)"
    ) as caught:
        finite_or_raise(x * torch.nan, "The state", step=None, time=0.5)
    assert caught.value.shifted(100).rows[0] == 100
