"""Published sizes."""

from soar_mega.models.flux.sizes import FluxSizes

PRESETS = {"flux_dev": FluxSizes(guidance_embeds=True), "flux_schnell": FluxSizes()}
