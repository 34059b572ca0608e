"""MixFlow: fine-tuning on states that are noisier than the model is told, as a sampler's own states are.

Told sigma s, the model sees the ray at s_in = s + gamma U (1 - s), and learns the direction of the ray, which is the
same at both. With gamma 0 this is supervised fine-tuning. arXiv 2512.19311.
"""

from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import slowed, uniform
from soar_mega.stages.settings import MixFlowConfig
from soar_mega.stages.sft import Sft


class MixFlow(Sft):
    """Flow matching on slowed states, for the cost of fine-tuning."""

    config: MixFlowConfig

    def _state_sigma(self, batch: Batch, sigma: Tensor) -> Tensor:
        draws = uniform(batch.seed, "slowed", batch.position)[:, 0]
        return slowed(sigma, self.config.gamma, draws)
