"""The noise of a kernel against `soar_mega.flow.noise`: equal integers, normals to 1e-6."""

import numpy as np
import torch
from guards import worst

from soar_mega.flow.noise import normal, philox, stream_key
from soar_mega.kernels.point_tables import signed_key

KEY = stream_key(5, "rollout")
POSITION = 2**40 + 12345


def test_words_are_equal_bit_for_bit(interpreted):
    import probes

    words = torch.empty(4, 64, dtype=torch.int64)
    probes.words_kernel[(1,)](torch.tensor([signed_key(5, "rollout"), 3, POSITION]), words, 64)
    counter = torch.tensor([[quad, 3, POSITION & 0xFFFFFFFF, POSITION >> 32] for quad in range(64)])
    assert torch.equal(words.T, philox(counter, KEY))


def test_normals_of_a_block_and_of_single_elements(interpreted):
    import probes

    expected = normal(5, "rollout", torch.tensor([POSITION]), 3, (512,))[0]
    block, single = torch.empty(256), torch.empty(256)
    probes.normals_kernel[(1,)](
        torch.tensor([signed_key(5, "rollout"), 3, POSITION]), block, single, 256, 256
    )
    assert worst(block, expected[256:]) < 1e-6
    assert torch.equal(block, single)


def test_box_muller_at_the_ends_of_the_words(interpreted):
    """Words next to 0, to one half and to 1, and angles at every eighth of a turn, in every combination."""
    import probes

    ends = [0, 1, 2, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1000, 2**32 - 2, 2**32 - 1]
    eighths = [(k * 2**29 + step) % 2**32 for k in range(8) for step in (-1, 0, 1)]
    pairs = torch.tensor([(x, y) for x in ends for y in eighths])
    padded = torch.cat([pairs, pairs[:16]])  # 256 pairs
    found = torch.empty(2, 256)
    probes.box_muller_kernel[(1,)](padded[:, 0].contiguous(), padded[:, 1].contiguous(), found, 256)
    x, y = padded.numpy().astype(np.float64).T
    found = found.numpy()
    radius, angle = np.sqrt(-2 * np.log((x + 0.5) / 2**32)), 2 * np.pi * (y + 0.5) / 2**32
    # near x = 2^32 the radius is tiny: relative to itself, not to the largest
    error = np.hypot(found[0] - radius * np.cos(angle), found[1] - radius * np.sin(angle)) / radius
    assert error.max() < 1e-6
