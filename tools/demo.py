"""The whole road on the built-in model, in one command: data, three ways of training, evaluation, export, report.

    make demo                            about six minutes on two cores; runs/demo/report.html
    python tools/demo.py --quick         the same road in a minute or two, for checking the road itself

What the demo trains, encodes and measures, it does by commands that could be typed by hand; their
output is in runs/demo/logs. A step that is finished is not repeated: remove runs/demo to start again.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walk.commands import Command, logged, run_together, soar_mega, torchrun
from walk.data import prepare_data
from walk.steps import Steps, run_tool

BASE = Path("recipes/tiny/base")
ARMS = ("sft", "sft_multi", "soar")
GUIDANCE = 3.0
SAMPLES_PER_PROMPT = 6
SAMPLE_PROMPTS = (
    "a red 3",
    "an 8",
    "a 4 and a 9",
    "three 5",
    "a blue 7",
    "a 2 above a 6",
    "a green 1 left of a yellow 8",
    "a white 0 and a red 5",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    canvases: int = 4000
    held_out: int = 256
    iterations: int = 200
    prompts_per_category: int = 60
    drift_samples: int = 128


QUICK = Size(canvases=192, held_out=48, iterations=4, prompts_per_category=3, drift_samples=32)


class Demo:
    """The steps of the demo, in order, in one folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.cores = os.cpu_count() or 1
        self.tensor, self.pipeline = layout()
        self.steps = Steps(folder, STEPS)

    def run(self) -> None:
        pictures, step = self.size.canvases, self.steps.take
        step("data", f"drawing {pictures} captioned pictures and encoding them into shards", self.prepare)
        step(
            "sft", "training SFT and the control side by side, then measuring base and SFT", self.train_single
        )
        processes = self.tensor * self.pipeline
        where = (
            f"TP {self.tensor} x PP {self.pipeline}, {processes} processes"
            if processes > 1
            else "one process"
        )
        step("soar", f"training SOAR ({where})", self.train_soar)
        step("evaluation", "measuring the control and SOAR", self.evaluate)
        step("pictures", "drawing sample pictures", self.draw)
        step("export", "loading the result in diffusers", self.check_export)
        step("report", "writing the report", self.report)

    def prepare(self) -> None:
        prepare_data(self.folder, BASE, self.size.canvases, self.size.held_out, self.threads(2))

    def train_single(self) -> None:
        """The control takes three times as long as SFT: the core that SFT leaves measures meanwhile."""
        sft, control = (self.training(arm, soar_mega, self.threads(2)) for arm in ("sft", "sft_multi"))
        run_together([sft, self.evaluation("base", "sft")], [control])

    def train_soar(self) -> None:
        processes = self.tensor * self.pipeline
        if processes == 1:
            run_together([self.training("soar", soar_mega, self.threads(1))])
            return
        layout = [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
        ]
        command = self.training("soar", lambda *a: torchrun(processes, *a, *layout), self.threads(processes))
        run_together([command])

    def training(self, arm: str, launch: Callable[..., list[str]], threads: int) -> Command:
        """`soar-mega train` of an arm's recipe with this demo's folders and length."""
        overrides = [
            f"checkpoint.save={self.run_of(arm)}",
            f"data.path={self.folder}/shards/train",
            f"data.validation_path={self.folder}/shards/heldout",
            f"train.train_iters={self.size.iterations}",
        ]
        arguments = launch("train", f"recipes/tiny/{arm}.yaml", *overrides)
        return logged(self.folder, arm, arguments, threads)

    def evaluate(self) -> None:
        run_together([self.evaluation("sft_multi")], [self.evaluation("soar")])

    def evaluation(self, *arms: str) -> Command:
        """What examples/digits measures of some arms."""
        arguments = [
            *(sys.executable, "-m", "soar_mega.examples.digits"),
            *(f"{arm}={self.pipeline_of(arm)}" for arm in arms),
            *("--held-out", f"{self.folder}/shards/heldout", "--out", str(self.evaluation_of(*arms))),
            *("--guidance-scale", "1", "--guidance-scale", f"{GUIDANCE:g}"),
            *("--prompts-per-category", str(self.size.prompts_per_category)),
            *("--drift-samples", str(self.size.drift_samples)),
        ]
        return logged(self.folder, "evaluate-" + "-".join(arms), arguments, self.threads(2))

    def draw(self) -> None:
        """As `soar-mega sample` does, the four pipelines in one process."""
        import torch

        from soar_mega.cli.process import start_process

        start_process()
        torch.set_num_threads(1)  # these forwards are too small to share

        from soar_mega.data.prompts import encode_prompts
        from soar_mega.evaluation.generate import Generator, image_grid, save_image

        for arm, path in self.samples().items():
            prompts = encode_prompts(self.pipeline_of(arm), SAMPLE_PROMPTS)
            generator = Generator.load(self.pipeline_of(arm))
            images = generator.images(
                prompts, steps=20, guidance_scale=GUIDANCE, num_images_per_prompt=SAMPLES_PER_PROMPT
            )
            save_image(image_grid(images, SAMPLES_PER_PROMPT), path, scale=2)

    def check_export(self) -> None:
        """Loads the SOAR export with diffusers alone and draws from it."""
        import diffusers
        import torch
        import transformers
        from report.figures import side_by_side

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(str(self.pipeline_of("soar")))
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            prompt=list(SAMPLE_PROMPTS),
            height=16,
            width=16,
            num_inference_steps=20,
            guidance_scale=GUIDANCE,
            max_sequence_length=10,
            generator=torch.Generator().manual_seed(0),
        )
        side_by_side(drawn.images, scale=4).save(self.folder / "diffusers.png")

    def report(self) -> None:
        from report.page import write_report

        parts = [
            json.loads(self.evaluation_of(*arms).read_text())
            for arms in (("base", "sft"), ("sft_multi",), ("soar",))
        ]
        metrics = parts[0]
        for part in parts[1:]:
            metrics["pipelines"] |= part["pipelines"]
        metrics["demo"] = self.description()
        (self.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        write_report(metrics, self.samples(), self.folder / "report.html")

    def description(self) -> dict[str, Any]:
        """What the report tells about the runs themselves."""
        from walk.curves import loss_curves
        from walk.work import forward_units

        from soar_mega.stages import load_recipe

        runs = {}
        for arm in ARMS:
            recipe = load_recipe(self.run_of(arm) / "run_config.yaml", [])
            runs[arm] = {
                "iterations": recipe.train.train_iters,
                "batch_size": recipe.train.global_batch_size,
                "points": recipe.stage.forwards().points,
                "forwards": forward_units(recipe.stage),
                "tensor_parallel": recipe.parallel.tensor_model_parallel_size,
                "pipeline_parallel": recipe.parallel.pipeline_model_parallel_size,
                "losses": loss_curves(self.run_of(arm)),
            }
        return {
            "runs": runs,
            "guidance_scale": GUIDANCE,
            "sample_prompts": SAMPLE_PROMPTS,
            "seconds": self.steps.seconds,
            "export": {"folder": str(self.pipeline_of("soar")), "drawn": f"{len(SAMPLE_PROMPTS)} pictures"},
        }

    def threads(self, processes: int) -> int:
        """Threads of each of several processes that share the machine."""
        return max(1, self.cores // processes)

    def run_of(self, arm: str) -> Path:
        return self.folder / arm

    def pipeline_of(self, arm: str) -> Path:
        """Of a trained arm the EMA weights: less noisy than the last step's."""
        return BASE if arm == "base" else self.run_of(arm) / "export_ema"

    def evaluation_of(self, *arms: str) -> Path:
        return self.folder / "logs" / f"evaluation-{'-'.join(arms)}.json"

    def samples(self) -> dict[str, Path]:
        return {name: self.folder / "samples" / f"{name}.png" for name in ("base", *ARMS)}


STEPS = ("data", "sft", "soar", "evaluation", "pictures", "export", "report")


def layout() -> tuple[int, int]:
    """TP x PP of the SOAR run: 2 x 2 processes on a CPU, and on GPUs what there are enough of."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() >= 4:
        return 2, 2
    return (2, 1) if torch.cuda.device_count() >= 2 else (1, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything; the numbers mean nothing"
    )
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    return run_tool("demo", lambda: Demo(arguments.folder, size))


if __name__ == "__main__":
    sys.exit(main())
