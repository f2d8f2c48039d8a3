r"""The classifier two-sample test: can a classifier tell the sets apart?

Half of each set trains a classifier of "from a" against "from b", the other half is held out. The accuracy is the mean
of its accuracies on the two held-out sets, 1/2 at chance for sets of any sizes. If the distributions agree, held-out
points carry no trace of their origin, and given how many of them the classifier takes for a, the number of those from a
that it gets right has the hypergeometric law: the p-value, that of Fisher's test, is exact for any sizes and any
classifier. The best possible accuracy is

    1/2 + TV(P, Q) / 2,        Phi(delta / 2) for two normals of one covariance, delta standard deviations apart.

The held-out half is one split and not a cross-validation: folds share training data, and the p-value of their sum would
not be exact.

Reference: Lopez-Paz and Oquab 2017 (arXiv:1610.06545).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor

from sdediff.errors import OptionError, optional_import
from sdediff.sets import pair


class TwoSample(NamedTuple):
    """Result of the test.

    Attributes:
        accuracy: balanced accuracy on held-out samples, 1/2 where the sets cannot be told apart.
        stderr: its standard error over the held-out samples; 0 where all of them, or none, are right.
        p_value: the probability of so high an accuracy, or a higher one, if the distributions agree.
    """

    accuracy: float
    stderr: float
    p_value: float


def classifier_two_sample(
    a: Float[Tensor, " m *event"], b: Float[Tensor, " n *event"], *, classifier: Any = None, seed: int = 0
) -> TwoSample:
    """Classifier two-sample test of two sets.

    Args:
        a, b: sets of samples, four at least of each.
        classifier: any classifier of scikit-learn with `predict_proba`; a copy of it is trained. If None, a perceptron
            with 64 hidden units on standardised entries, penalised and fitted by L-BFGS.
        seed: of the split and of the classifier, if it has a `random_state`.

    Raises:
        ShapeError: the sets do not compare.
        OptionError: a sample is not finite, or the classifier gives no probabilities.
        MissingExtraError: scikit-learn is not installed.
    """
    first, second = pair(a, b, least=4)
    if classifier is not None and not hasattr(classifier, "predict_proba"):
        raise OptionError(
            "classifier must be a classifier of scikit-learn with predict_proba, such as KNeighborsClassifier(); "
            f"got {type(classifier).__name__}."
        )
    generator = torch.Generator().manual_seed(seed)
    halves = [c[torch.randperm(len(c), generator=generator)].tensor_split([len(c) // 2]) for c in (first, second)]
    (train_a, test_a), (train_b, test_b) = [[half.cpu() for half in pair_] for pair_ in halves]
    model = _perceptron() if classifier is None else optional_import("sklearn.base", "metrics").clone(classifier)
    seeds = {name: seed for name in model.get_params() if name.split("__")[-1] == "random_state"}
    model.set_params(**seeds)
    with warnings.catch_warnings():  # that it could have been trained for longer
        warnings.simplefilter("ignore", optional_import("sklearn.exceptions", "metrics").ConvergenceWarning)
        model.fit(torch.cat([train_a, train_b]).numpy(), [1] * len(train_a) + [0] * len(train_b))
    share = len(train_a) / (len(train_a) + len(train_b))
    said = [torch.from_numpy(model.predict_proba(c.numpy())[:, 1]) > share for c in (test_a, test_b)]
    right_a, wrong_b = (int(c.sum()) for c in said)
    rates = [(right_a / len(test_a), len(test_a)), (1 - wrong_b / len(test_b), len(test_b))]
    tail = hypergeom(len(test_a) + len(test_b), len(test_a), right_a + wrong_b).sf(right_a - 1)
    return TwoSample(
        sum(rate for rate, _ in rates) / 2,
        math.sqrt(sum(rate * (1 - rate) / n for rate, n in rates)) / 2,
        float(tail),
    )


def _perceptron() -> Any:
    networks = optional_import("sklearn.neural_network", "metrics")
    network = networks.MLPClassifier(hidden_layer_sizes=(64,), solver="lbfgs", alpha=1.0)
    scaler = optional_import("sklearn.preprocessing", "metrics").StandardScaler()
    return optional_import("sklearn.pipeline", "metrics").make_pipeline(scaler, network)
