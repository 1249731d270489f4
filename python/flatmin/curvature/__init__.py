"""How curved the loss is: eigenvalues, their density, traces and diagonals of the Hessian and its kin.

Every function takes a model, a loss, data and optionally some of the parameters::

    diag, stderr, _ = curvature.hutchinson_diag(model, torch.nn.functional.cross_entropy, loader, samples=100)

* ``model`` is called as ``model(inputs)``, in the mode in which it is: call ``model.eval()`` first to measure without
  dropout and with BatchNorm's running statistics. In training mode every pass draws the same dropout masks.
* ``loss_fn(model(inputs), targets)`` is the mean loss of a batch, as a torch criterion returns it. Buffers of a
  criterion that is a module are kept as the model's are.
* ``data`` is a DataLoader, a list of batches ``(inputs, targets)``, or one such pair. Inputs and targets may be tensors
  or containers of them: lists, tuples, mappings, objects with a ``to`` method. Batches of another form, as the
  dictionaries of language models, go in through :class:`Batches`, with a function that feeds them to the model.
  What is measured is the mean loss over all of the data; a batch counts as often as it has samples, so a ragged last
  batch has its due weight. That number is the first dimension of its tensors; where they differ, it is an error, unless
  ``Batches(size=...)`` says it. Batches are moved to the model's device, in containers of the same types.
* Every pass must see the same data. Shuffling, and augmentation that draws from the global generators of torch, Python
  or numpy, is repeated. Data that differ all the same, from an augmentation with hidden generators or from persistent
  workers, raise ``ValueError``.
* ``params`` is the list of tensors to differentiate by, None for all that require gradients. A parameter that the loss
  does not use has derivative 0.

The Hessian has kin: every function that takes ``matrix`` also measures the generalised Gauss-Newton matrix ("ggn") and
the empirical Fisher matrix ("fisher"). All of them work with one operator, which can be used by itself::

    with curvature.linear_operator(model, loss_fn, loader, matrix="ggn") as A:   # the model's state is saved once
        top = curvature.eigenvalues(A, k=5)
        density = curvature.spectral_density(A, probes=10, steps=50)
        trace = curvature.trace(A, products=60, estimator="xtrace")

Weights, ``.grad``, ``requires_grad``, buffers, mode and the random numbers of torch, Python and numpy, and those of
generators that a module has as attributes, are afterwards what they were, bit for bit, also after an exception. Random
estimates are functions of ``seed`` alone. No graph outlives its batch: the memory is that of one double backward pass
(of one backward pass with finite differences) and a few copies of the parameters. ``progress`` True or False shows or
hides a progress bar (tqdm, if installed); None shows it in a terminal after two seconds.

Results are float32, or float64 for float64 parameters. Units: a curvature is a loss / weight^2, its Lipschitz constant
a loss / weight^3. docs/glossary.md has the names of the arguments.
"""

import importlib
from typing import Any

from ._batches import Batches
from ._density import SpectralDensity, spectral_density
from ._diagonals import (
    exact_diag,
    gnb_diag,
    hutchinson_diag,
    spatial_average,
    squared_gradient_diag,
)
from ._hvp import hvp
from ._lanczos import Eigenvalues, eigenvalues
from ._layers import layer_eigenvalues, layer_traces
from ._linear_operator import CurvatureOperator, linear_operator
from ._lipschitz import lipschitz
from ._probes import Estimate, ScalarEstimate
from ._trace import hutchinson_trace
from ._trace_estimators import trace

__all__ = [
    "Batches",
    "CurvatureOperator",
    "Eigenvalues",
    "Estimate",
    "ScalarEstimate",
    "SpectralDensity",
    "eigenvalues",
    "exact_diag",
    "gnb_diag",
    "hutchinson_diag",
    "hutchinson_trace",
    "hvp",
    "layer_eigenvalues",
    "layer_traces",
    "linear_operator",
    "lipschitz",
    "spatial_average",
    "spectral_density",
    "squared_gradient_diag",
    "trace",
]


def __getattr__(name: str) -> Any:
    """``expected_sharpness`` moved to :mod:`flatmin.sharpness`, which imports this package; its old name stays."""
    if name == "expected_sharpness":
        return importlib.import_module("flatmin.sharpness").expected_sharpness
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
