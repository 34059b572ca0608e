"""The sources of points without an engine's plan: all of them at once."""

from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.kernels.point_tables import PointTable, group_table, point_table, uses
from soar_mega.stages.latent_sources import DRAWN, Sources
from soar_mega.stages.points import Points
from soar_mega.upload import upload


def gather_sources(batch: Batch, points: Points, v_uncond: Tensor | None, v_cond: Tensor | None) -> Sources:
    """The sources of M points at once.

    Args:
        v_uncond: [B, C, H, W] answers of the batch's samples, or None. v_cond: the same.
    """
    assert batch.latents is not None
    device, size = batch.latents.device, len(points)
    position = batch.position[points.sample]
    groups, group, _ = group_table(points.sample, points.path, points.sample, position, batch.seed, size)
    rows = (points.state_rows, points.target_rows)
    on_device = upload([groups, *(point_table(each, group) for each in rows)], device)
    states, targets = (
        PointTable(on_device[0], table, uses(each, size)[0], DRAWN, batch.seed)
        for each, table in zip(rows, on_device[1:], strict=True)
    )
    return Sources(
        z0=batch.latents,
        v_uncond=v_uncond,
        v_cond=v_cond,
        states=states,
        targets=targets,
        fused=points.fused,
    )
