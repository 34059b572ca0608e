"""The published procedure as an arm of a comparison: with its optimizer, accumulation and, if asked, online
encoders.
"""

from contextlib import nullcontext

import torch
from baseline.case import LEARNING_RATE, Case, Samples, make_samples
from baseline.published import MicroBatch, Procedure, draw, predict, soar_backward
from diffusers import SD3Transformer2DModel

from soar_mega.distributed import device
from soar_mega.stages import SoarConfig


class PublishedArm:
    """The published procedure, with gradient accumulation over micro-batches.

    bf16 is autocast over fp32 weights, as accelerate does it. With `online` images and prompts are encoded
    in every step.
    """

    def __init__(self, case: Case, procedure: Procedure, micro_batch_size: int, online: bool = False) -> None:
        self.device = device()
        self.procedure, self.micro_batch_size = procedure, micro_batch_size
        self.autocast = (
            torch.autocast(self.device.type, torch.bfloat16) if case.dtype == "bf16" else nullcontext()
        )
        self.model = build_diffusers(case, self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2, fused=True
        )
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.samples = make_samples(case, self.device)
        self.online = OnlineEncoders(case, self.device) if online else None

    def step(self) -> None:
        samples = self.online.encode() if self.online else self.samples
        total = len(samples.latents)
        for start in range(0, total, self.micro_batch_size):
            chosen = slice(start, start + self.micro_batch_size)
            micro = MicroBatch(
                latents=samples.latents[chosen],
                text=samples.text[chosen],
                pooled=samples.pooled[chosen],
                empty_text=samples.empty_text,
                empty_pooled=samples.empty_pooled,
            )
            draws = draw(self.procedure, micro.latents, self.generator)
            with self.autocast:
                soar_backward(self.model, micro, draws, self.procedure, scale=len(micro.latents) / total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class OneForward:
    """One forward of one sample without a gradient: the unit in which work is counted."""

    def __init__(self, case: Case) -> None:
        self.model, self.samples = build_diffusers(case, device()), make_samples(case, device())

    @torch.no_grad()
    def step(self) -> None:
        s = self.samples
        timestep = torch.full((1,), 500.0, device=s.latents.device)
        predict(self.model, s.latents[:1], timestep, s.text[:1], s.pooled[:1])


class OnlineEncoders:
    """A global batch encoded from images and prompts by the pipeline's own encoders."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from soar_mega.data.loaded_encoders import Encoders
        from soar_mega.examples.digits.canvases import make_canvas

        canvases = [make_canvas(0, index) for index in range(case.batch_size)]
        self.images = torch.stack([torch.from_numpy(c.image) * 2 - 1 for c in canvases])
        self.prompts = [c.caption.text for c in canvases]
        self.encoders = Encoders.from_pipeline(
            case.pipeline_dir, device, torch.float32, case.text_length // 2
        )

    @torch.no_grad()
    def encode(self) -> Samples:
        mean, std = self.encoders.encode_images(self.images)
        text, pooled = self.encoders.encode_prompts([*self.prompts, ""])
        return Samples(
            latents=mean + std * torch.randn_like(mean),
            text=text[:-1],
            pooled=pooled[:-1],
            empty_text=text[-1],
            empty_pooled=pooled[-1],
        )


def build_diffusers(case: Case, device: torch.device) -> SD3Transformer2DModel:
    """fp32 weights, made where they are used; attention is diffusers' default, PyTorch's SDPA."""
    if case.pipeline_dir:
        model = SD3Transformer2DModel.from_pretrained(case.pipeline_dir, subfolder="transformer").to(device)
    else:
        with device:
            model = SD3Transformer2DModel(**case.config)
    model.train()
    if case.recompute:
        model.enable_gradient_checkpointing()
    return model


def procedure_of(case: Case, **habits: bool) -> Procedure:
    """The method's numbers of the case, with the published habits unless given otherwise."""
    stage = case.stage
    assert isinstance(stage, SoarConfig) and stage.shift is not None
    return Procedure(
        shift=stage.shift,
        num_auxiliary_points=stage.num_auxiliary_points,
        auxiliary_weight=stage.auxiliary_weight,
        guidance_scale=stage.guidance_scale,
        sampling_steps=stage.sampling_steps,
        **habits,
    )
