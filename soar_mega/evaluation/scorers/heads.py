"""The head of five linear layers without activations that the aesthetic score and ImageReward have."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Under the names of the published files: layers.0, 2, 4, 6, 7, the gaps being dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[N, width] -> [N, 1]"""
        value: Tensor = self.layers(feature)
        return value
