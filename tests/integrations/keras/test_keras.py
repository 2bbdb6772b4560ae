"""Optimizers of Keras 3 on torch: the same losses as with Keras's own clipping, and what Keras does not have."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import distclip
from distclip.integrations.keras import attach, detach
from tests.frameworks import skip_without

skip_without("keras", reason="Keras is not installed: pip install 'distclip[keras]'")
# Read at the first import of Keras, in a test.
os.environ["KERAS_BACKEND"] = "torch"

# NumPy warns about torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

INPUTS = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
TARGETS = 30 * INPUTS.sum(1, keepdims=True)
CLIPPING = {
    "clipnorm": (0.5, distclip.NormPolicy(distclip.Fixed(0.5), per="tensor")),
    "global_clipnorm": (0.5, distclip.NormPolicy(distclip.Fixed(0.5))),
    "clipvalue": (0.01, distclip.value(0.01)),
}


def build_model(**options: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer=keras.optimizers.Adam(0.1, **options), loss="mse")
    return model


def fit(model: Any, inputs: Any = INPUTS) -> None:
    model.fit(inputs, TARGETS[: len(inputs)], batch_size=8, verbose=0, shuffle=False)


def step_by_hand(model: Any) -> None:
    """Make the steps of `fit` in a loop, with gradients that are not in `.grad`."""
    for i in range(0, 32, 8):
        loss = (model(torch.tensor(INPUTS[i : i + 8])) - torch.tensor(TARGETS[i : i + 8])).square().mean()
        grads = torch.autograd.grad(loss, [variable.value for variable in model.trainable_variables])
        with torch.no_grad():
            model.optimizer.apply(list(grads), model.trainable_variables)


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("accumulation", [None, 2])
def test_policies_replace_the_clipping_of_keras(name: str, accumulation: int | None) -> None:
    bound, policy = CLIPPING[name]
    expected = build_model(gradient_accumulation_steps=accumulation, **{name: bound})
    fit(expected)
    for train in (fit, step_by_hand):
        # The optimizer's own bound is replaced too.
        model = build_model(gradient_accumulation_steps=accumulation, clipnorm=1e-6)
        attachment = attach(model.optimizer, policy)
        train(model)
        for weight, other in zip(model.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-6)
        assert attachment.clipper.steps == (4 if accumulation is None else 2)
        assert attachment.report.clipped


def test_skipped_step_changes_nothing() -> None:
    model = build_model(weight_decay=0.1)
    attachment = attach(model.optimizer, distclip.global_norm(1.0))
    fit(model)
    before = [np.array(variable) for variable in (*model.get_weights(), *map(np.array, model.optimizer.variables[2:]))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, np.full((8, 4), np.nan, dtype="float32"))
    (warning,) = [one for one in caught if one.category is distclip.NonFiniteWarning]
    assert warning.filename == __file__
    assert "sequential" in str(warning.message)
    after = (*model.get_weights(), *map(np.array, model.optimizer.variables[2:]))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert attachment.clipper.skipped == 1


def test_state_continues_and_detach_restores() -> None:
    model = build_model(clipnorm=0.5)
    attachment = attach(model.optimizer, distclip.zclip(cap=1.0))
    fit(model)
    detach(model.optimizer)
    assert not hasattr(model.optimizer, "distclip")
    other = attach(model.optimizer, distclip.zclip(cap=1.0))
    other.load_state_dict(attachment.state_dict())
    fit(model)
    assert other.clipper.steps == 8
    other.detach()
    assert model.optimizer._clip_gradients.__self__ is model.optimizer


def test_invalid_input() -> None:
    import keras

    optimizer = keras.optimizers.SGD(0.1)
    with pytest.raises(distclip.ArgumentError, match=r"not an optimizer of Keras 3. Pass model.optimizer"):
        attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), distclip.global_norm(1.0))
    with pytest.raises(distclip.ArgumentError, match="expected a policy"):
        attach(optimizer, 1.0)
    attach(optimizer, distclip.global_norm(1.0))
    with pytest.raises(distclip.ArgumentError, match="has a policy already"):
        attach(optimizer, distclip.global_norm(1.0))
