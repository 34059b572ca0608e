"""The planner's best layouts can be run, its reasons add up, and it is as far from the measured rows as it says."""

import math
import re
from dataclasses import asdict, replace

import plan_layout
import pytest
import yaml
from plan import check
from plan.gloo import LAYOUTS, SIZES, recipe_of
from plan.hardware import HARDWARE
from plan.search import Case, search
from plan.step_time import StepModel
from plan.validate import predicted, process_of, run, spearman

from soar_mega.config import ModelConfig, Recipe, TrainConfig
from soar_mega.config_checks import check_recipe
from soar_mega.distributed import check_layout as check_processes
from soar_mega.models.common.flops import Tokens
from soar_mega.models.common.layout import check_layout
from soar_mega.models.common.memory import workload
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.stages import SoarConfig, load_recipe


@pytest.fixture(scope="module")
def planned():
    recipe = Recipe(
        stage=SoarConfig(), model=ModelConfig(preset="sd35_large"), train=TrainConfig(global_batch_size=24)
    )
    case = Case(PRESETS["sd35_large"], recipe, 6, HARDWARE["a100-80"], (64, 64), 154)
    return case, *search(case)


def test_every_plan_is_a_recipe_that_fits(planned):
    case, plans, _ = planned
    assert plans and plans == sorted(plans, key=lambda plan: plan.time.total)
    for plan in plan_layout.best_of_each_layout(plans):
        parallel = plan.recipe.parallel
        sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        check_processes(6, *sizes, parallel.context_parallel_size)
        assert plan.memory.total <= case.room
        assert min(asdict(plan.time).values()) >= 0


def test_the_printed_block_is_a_recipe(planned, tmp_path):
    case, plans, refused = planned
    text = plan_layout.report(case, plans, refused)
    block = yaml.safe_load(text[text.index("\nmodel:") :])
    block["model"] |= {"preset": "sd35_large", "init": "random"}
    block |= {"stage": {"shift": 3.0}, "data": {"path": "x"}, "checkpoint": {"save": "y"}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(block))
    recipe = load_recipe(tmp_path / "plan.yaml")
    check_recipe(recipe)
    assert recipe.parallel == plans[0].recipe.parallel
    assert re.search(r"\d+: heads 38 not divisible by TP 3\n", text)
    assert re.search(r"\d+: need more than 74 GiB\n", text)


def test_what_it_says_of_the_measured_rows_is_as_good_as_the_docs_say():
    errors = re.findall(r"([+-][\d.]+)%", check.check())
    assert len(errors) == 9 and max(abs(float(error)) for error in errors) < 13


def test_a_product_takes_whole_waves_of_tiles():
    recipe = Recipe(stage=SoarConfig(), model=ModelConfig(preset="sd35_medium"))
    h100 = HARDWARE["h100"]
    model = StepModel(PRESETS["sd35_medium"], recipe, h100, 1, 8, Tokens(1024, 154))
    rows, columns = h100.tile
    assert h100.units == 12 * 11
    one_wave = model.gemm(12 * rows, 4096, 11 * columns)
    assert model.gemm(12 * rows + 1, 4096, 11 * columns) == pytest.approx(2 * one_wave)
    assert model.gemm(11 * rows, 4096, 11 * columns) == one_wave  # a wave that is not full takes as long


def test_a_pipeline_has_a_bubble_and_parts_of_a_model_make_it_shorter():
    def bubble(chunks):
        recipe = Recipe(
            model=ModelConfig(preset="sd35_medium"),
            stage=SoarConfig(),
            train=TrainConfig(points_per_micro_batch=4),
        )
        recipe.parallel.pipeline_model_parallel_size = 4
        recipe.parallel.virtual_pipeline_model_parallel_size = chunks
        model = StepModel(PRESETS["sd35_medium"], recipe, HARDWARE["h100"], 2, 8, Tokens(1024, 154))
        return model.step(workload(recipe, 2, (64, 64), 154)).bubble

    assert 0 < bubble(2) < bubble(None)


def test_order_of_layouts_is_compared_by_rank():
    assert (
        spearman([1.0, 2.0, 5.0], [3.0, 4.0, 4.5]) == 1 and spearman([1.0, 2.0, 5.0], [5.0, 2.0, 1.0]) == -1
    )


def test_layouts_of_gloo_processes_have_a_time_and_collectives_cost_where_there_are_many():
    constants = {"gemm": 4e10, "attention": (3e10, 2e10), "copy": 2e10, "link": 8e8, "link_latency": 3e-3}
    process = process_of(constants)
    for layout in LAYOUTS:
        check_layout(SIZES, recipe_of(layout).parallel)
        assert predicted(layout, process) > 0
    slower = replace(process, link_latency=2 * process.link_latency)
    assert predicted("TP4", slower) > 1.2 * predicted("TP4", process)
    assert predicted("DP4", slower) < 1.2 * predicted("DP4", process)


@pytest.mark.slow
def test_the_constants_of_gloo_processes_are_measured():
    constants = run("plan.calibrate")
    assert all(0 < value < math.inf for value in (*constants.pop("attention"), *constants.values()))
