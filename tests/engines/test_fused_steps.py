"""A whole SOAR step by plain torch calls, by the kernels' eager twins, and by their Triton source, interpreted."""

from dataclasses import replace

import pytest
from engine_cases import SOAR, assert_gradients_agree, make_batch, make_recipe, start_engine

from soar_mega.kernels import losses_of
from soar_mega.kernels.dispatch import interpreted
from soar_mega.stages import make_stage
from soar_mega.stages.latent_sources import Sources


def step(fused: bool):
    """Statistics and gradients of one step of two samples with two paths."""
    stage_config = replace(SOAR, num_auxiliary_points=1, fused_kernels=fused)
    recipe = make_recipe(
        stage=stage_config,
        train={"global_batch_size": 2, "points_per_micro_batch": 6},
        model={"fused_kernels": fused},
    )
    engine, stage, batch = (
        start_engine(recipe),
        make_stage(stage_config, shift=1.0),
        make_batch(0, size=2, invalid=None),
    )
    statistics = engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    return statistics, engine.gradients()


def test_kernels_do_what_plain_calls_do(monkeypatch):
    called = []

    def counted(*args, **options):
        called.append(True)
        return losses_of(*args, **options)

    monkeypatch.setattr("soar_mega.stages.latent_sources.losses_of", counted)
    plain, plain_gradients = step(fused=False)
    assert not called
    fused, fused_gradients = step(fused=True)
    assert called
    assert fused == pytest.approx(plain, rel=1e-6)
    assert_gradients_agree(fused_gradients, plain_gradients)


@pytest.mark.slow
def test_the_interpreted_source_does_what_the_eager_twins_do(monkeypatch):
    eager, eager_gradients = step(fused=True)
    launched = []

    def combine(self, *args):
        launched.append(interpreted())
        return original(self, *args)

    original = Sources.combine
    monkeypatch.setattr(Sources, "combine", combine)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, found_gradients = step(fused=True)
    assert launched and all(launched)
    assert found == pytest.approx(eager, rel=1e-5)
    assert_gradients_agree(found_gradients, eager_gradients)
