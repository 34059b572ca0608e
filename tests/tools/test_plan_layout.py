"""The planner's best layouts can be run, its reasons add up, and it is as far from the measured rows as it says."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import plan_layout
import pytest
import yaml
from plan import check
from plan import search as searching
from plan.gloo import LAYOUTS, SIZES, recipe_of
from plan.hardware import HARDWARE
from plan.search import Case, search
from plan.step_time import MODULES, StepModel
from plan.validate import predicted, process_of, run, spearman

from soar_mega.config import ModelConfig, ParallelConfig, Recipe, TrainConfig
from soar_mega.config_checks import check_recipe
from soar_mega.distributed import check_layout as check_processes
from soar_mega.gpus import MEMORY
from soar_mega.models.common.flops import Tokens
from soar_mega.models.common.layout import check_layout
from soar_mega.models.common.memory import largest_rank, workload
from soar_mega.models.common.micro_batches import even_sizes
from soar_mega.models.common.sizes import image_side
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.stages import SoarConfig, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


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


@pytest.mark.parametrize("name", ["sd35_large", "flux_dev"])
def test_the_printed_block_may_be_written_over_a_large_recipe_key_by_key(planned, name, tmp_path):
    _, plans, _ = planned
    before = yaml.safe_load((RECIPES / name / "soar.yaml").read_text())
    before["parallel"] |= {"virtual_pipeline_model_parallel_size": 2, "overlap_param_gather": True}
    layouts = plan_layout.best_of_each_layout(plans)
    assert {plan.recipe.parallel.engine for plan in layouts} == {"megatron", "deepspeed"}
    for plan in layouts:
        block = yaml.safe_load(plan_layout.recipe_lines(plan))
        merged = before | {group: before.get(group, {}) | settings for group, settings in block.items()}
        (tmp_path / "merged.yaml").write_text(yaml.safe_dump(merged))
        recipe = load_recipe(tmp_path / "merged.yaml")
        check_recipe(recipe)
        assert recipe.parallel == plan.recipe.parallel


def test_every_even_micro_batch_is_tried_with_the_least_recomputation_that_fits(monkeypatch):
    for sizes in ("TENSOR", "PIPELINE", "CONTEXT"):
        monkeypatch.setattr(searching, sizes, (1,))
    recipe = Recipe(
        stage=SoarConfig(), model=ModelConfig(preset="sd35_medium"), train=TrainConfig(global_batch_size=2048)
    )
    case = Case(PRESETS["sd35_medium"], recipe, 64, HARDWARE["h100"], (64, 64), 154)
    plans, refused = search(case)
    of_megatron = [plan.recipe for plan in plans if plan.recipe.parallel.engine == "megatron"]
    sizes = [recipe.train.points_per_micro_batch for recipe in of_megatron]
    assert sorted(sizes, reverse=True) == [size for size in even_sizes(224, 1) if size <= 64]
    assert refused["fit with less recomputation too"] > 0


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


def model_of(gpus, points=8, **layout):
    """SD3.5-Large on H100s, in nodes of eight; with the replicas that the layout leaves."""
    recipe = Recipe(
        model=ModelConfig(preset="sd35_large"),
        stage=SoarConfig(),
        parallel=ParallelConfig(**layout),
        train=TrainConfig(global_batch_size=8 * gpus, points_per_micro_batch=points),
    )
    ranks = math.prod(value for key, value in layout.items() if key.endswith("parallel_size"))
    data_size = gpus // ranks
    sizes = PRESETS["sd35_large"]
    model = StepModel(sizes, recipe, HARDWARE["h100"], data_size, 8, Tokens(1024, 154))
    return model, workload(recipe, data_size, (64, 64), 154)


def test_deepspeed_hides_its_reduction_at_stage_3_alone():
    def reduction(points, stage):
        model, work = model_of(64, points, engine="deepspeed", zero_stage=stage)
        return model.step(work).reduction

    gradients = model_of(64)[0].elements * 4 / HARDWARE["h100"].link
    # a step has seven micro-batches of eight points
    assert reduction(8, 2) > 6 * gradients and reduction(8, 1) > gradients
    assert reduction(4, 2) - reduction(8, 2) > 6 * gradients
    # for a module's weights, of 64 ranks
    waiting = 2 * 7 * MODULES * 38 * 6 * HARDWARE["h100"].network_latency
    assert reduction(8, 3) == pytest.approx(waiting)


def test_a_group_that_lies_across_nodes_is_as_slow_as_the_network():
    model, _ = model_of(48, tensor_model_parallel_size=2)
    seconds = {span: model._collective(1e9, 2, span) for span in (2, 3, 6, 8)}
    assert seconds[2] == seconds[8] and seconds[3] == seconds[6] > 5 * seconds[2]
    assert model_of(6)[0]._collective(1e9, 2, 3) == seconds[2]  # one node is all
    whole, across = model_of(16)[0], model_of(12)[0]  # of two nodes both halves, and a half of the second
    assert across._over_replicas(1e9, 12) > 1.5 * whole._over_replicas(1e9, 16)


def test_messages_of_a_pipeline_stay_in_a_node_where_one_node_is_all():
    message = {gpus: model_of(gpus, pipeline_model_parallel_size=2)[0]._message(8) for gpus in (4, 8, 16)}
    assert message[4] == message[8] < message[16] / 5
    # four stages of four ranks: neighbours share a node at two of the three borders, and wait for the third
    parts = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4}
    one_node = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    assert model_of(16, **parts)[0]._message(8) > 5 * model_of(8, **one_node)[0]._message(8)


def test_deepspeed_has_no_memory_of_recorded_layers():
    model, work = model_of(64, engine="deepspeed", zero_stage=2)
    recipe = model.recipe
    without = replace(recipe, train=replace(recipe.train, cuda_graphs="none"))
    assert recipe.train.cuda_graphs == "layers"
    assert largest_rank(model.sizes, recipe, work, 64) == largest_rank(model.sizes, without, work, 64)


def test_it_knows_the_gpus_that_doctor_knows_and_says_what_it_leaves_out(planned):
    assert set(HARDWARE) == set(MEMORY)
    assert all(name == hardware.memory for name, hardware in HARDWARE.items())
    assert "FP8, flash-attn 3" in plan_layout.report(*planned).splitlines()[1]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--model nowhere", "nowhere is neither a pipeline folder nor a preset"),
        ("--gpus 0", "it must be a whole number, at least 1"),
        ("--gpus -4", "it must be a whole number, at least 1"),
        ("--gpus-per-node 0", "it must be a whole number, at least 1"),
        ("--global-batch-size 0", "it must be a whole number, at least 1"),
        ("--points -1", "it must be a whole number, at least 0"),
        ("--image-size 0", "it must be a whole number, at least 1"),
        ("--image-size 504", "--image-size 504: for this model it must be a multiple of 16"),
        ("--model sd35_large --image-size 4096", "it must be a multiple of 16 and at most 3072"),
        ("--text-length -1", "it must be a whole number, at least 1"),
        ("--ema-decay 2", "it must be a number, at least 0 and below 1"),
        ("--ema-decay much", "it must be a number, at least 0 and below 1"),
    ],
)
def test_a_word_that_cannot_be_is_refused_with_what_would_be_right(words, wanted, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan_layout.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        plan_layout.main()
    assert ended.value.code == 2
    assert wanted in capsys.readouterr().err


def test_images_are_as_large_as_the_model_takes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan_layout.py", "--model", "recipes/tiny/base", "--gpus", "2"])
    plan_layout.main()
    assert "64 image and 154 text tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--image-size 512: for this model it must be a multiple of 24"):
        image_side(replace(PRESETS["sd35_large"], patch_size=3), None)


def test_a_place_that_cannot_be_written_is_found_before_layouts_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("plan.validate.run", lambda *words: pytest.fail("something is measured"))
    monkeypatch.setattr("sys.argv", ["plan_layout.py", "--validate", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^--validate: {tmp_path} cannot be written: Is a directory$"):
        plan_layout.main()


def test_order_of_layouts_is_compared_by_rank():
    assert spearman([1.0, 2.0, 5.0], [3.0, 4.0, 4.5]) == pytest.approx(1) and spearman(
        [1.0, 2.0, 5.0], [5.0, 2.0, 1.0]
    ) == pytest.approx(-1)


def test_layouts_that_are_equally_fast_share_a_rank():
    assert spearman([1.0, 2.0, 3.0], [1.0, 1.0, 2.0]) == pytest.approx(3**0.5 / 2)


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
