"""Learning rate, length of training, and what counts as an improvement."""

from __future__ import annotations

import pytest

from equipot.train.recipe import OptimizerSection
from equipot.train.schedule import learning_rate, total_steps
from equipot.train.state import TrainerState

SETTINGS = OptimizerSection(learning_rate=1e-2, final_fraction=0.1, warmup_steps=10, steps=111)


def test_warm_up_then_cosine() -> None:
    rates = [learning_rate(step, 111, SETTINGS) for step in range(111)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx(1e-2 * (0.1 + 0.9 / 2))
    assert rates[110] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_training_ends_with_what_ends_first() -> None:
    assert total_steps(OptimizerSection(epochs=3), 40) == 120
    assert total_steps(OptimizerSection(epochs=3, steps=50), 40) == 50
    assert total_steps(OptimizerSection(steps=0), 40) == 0


def test_patience_counts_validations_without_improvement() -> None:
    state = TrainerState()
    for loss, best_step, without in [(2.0, 1, 0), (1.0, 2, 0), (1.5, 2, 1), (1.0, 2, 2), (0.5, 5, 0)]:
        state = state.after_step(epoch=state.step, epoch_offset=0).after_validation(loss)
        assert (state.best_step, state.validations_without_improvement) == (best_step, without)
        assert state.is_out_of_patience(2) == (without == 2)
        assert not state.is_out_of_patience(None)
