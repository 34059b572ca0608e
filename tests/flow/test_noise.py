import hashlib
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.flow import normal, philox, stream_key, uniform
from soar_mega.flow.noise import _box_muller, _unit_interval, balanced

MASK = np.uint64(0xFFFFFFFF)
WORD = st.integers(0, 2**32 - 1)


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 on uint64 arrays [..., 4], written from the paper."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        product0 = c[0] * np.uint64(0xD2511F53)
        product1 = c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k0,
            product1 & MASK,
            (product0 >> np.uint64(32)) ^ c[3] ^ k1,
            product0 & MASK,
        ]
        k0 = (k0 + np.uint64(0x9E3779B9)) & MASK
        k1 = (k1 + np.uint64(0xBB67AE85)) & MASK
    return np.stack(c, axis=-1)


def words(seed: int, stream: str, position: int, point: int, blocks: int) -> np.ndarray:
    """Words [blocks, 4] of the counters (block, point, position low, position high), by the numpy Philox."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    key = tuple(np.frombuffer(digest[:8], dtype="<u4").tolist())
    counter = np.zeros((blocks, 4), dtype=np.uint64)
    counter[:, 0] = np.arange(blocks)
    counter[:, 1:] = point, position % 2**32, position // 2**32
    return numpy_philox(counter, key)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the Random123 distribution
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert philox(torch.tensor(counter), (key[0], key[1])).tolist() == expected


@given(st.lists(WORD, min_size=4, max_size=4), WORD, WORD)
@settings(deadline=None)
def test_philox_equals_an_independent_implementation(counter, k0, k1):
    ours = philox(torch.tensor([[counter, counter[::-1]]]), (k0, k1))
    assert ours.shape == (1, 2, 4)
    assert (
        ours.numpy().astype(np.uint64).tolist()
        == numpy_philox(np.array([[counter, counter[::-1]]]), (k0, k1)).tolist()
    )


def test_stream_key_is_the_head_of_sha256():
    first = hashlib.sha256(b"42/noise").hexdigest()[:16]
    low, high = (int.from_bytes(bytes.fromhex(half), "little") for half in (first[:8], first[8:]))
    assert stream_key(42, "noise") == (low, high)
    assert len({stream_key(s, name) for s in (1, 2) for name in ("noise", "time")}) == 4


@pytest.mark.parametrize("position", [0, 7, 2**32 + 5, 2**62])
def test_normal_is_repeated_in_float32_by_the_documented_formula(position):
    x = words(3, "noise", position, 2, 8192)
    ours = normal(3, "noise", torch.tensor([position]), 2, (8192 * 4,)).numpy().reshape(8192, 4)
    f32 = np.float32
    for lane in (0, 2):
        a, b = x[:, lane], x[:, lane + 1]
        low = np.log((a.astype(f32) + f32(0.5)) * f32(2.0**-32))
        high = np.log1p(-((MASK - a).astype(f32) + f32(0.5)) * f32(2.0**-32))
        radius = np.sqrt(f32(-2) * np.where(a < 2**31, low, high))
        theta = f32(math.pi) * ((b.astype(np.uint32).view(np.int32).astype(f32) + f32(0.5)) * f32(2.0**-31))
        expected = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)
        assert expected.dtype == f32
        assert np.abs(ours[:, lane : lane + 2] - expected).max() < 1e-6 * np.abs(expected).max()


def test_uniform_is_the_documented_formula():
    x = words(3, "time", 11, 1, 3)
    pairs = x.reshape(6, 2)[:5]
    expected = [(int(a >> np.uint64(6)) * 2**26 + int(b >> np.uint64(6)) + 0.5) / 2**52 for a, b in pairs]
    assert uniform(3, "time", torch.tensor([11]), 1, 5)[0].tolist() == expected


def test_uniform_stays_strictly_inside_the_unit_interval():
    ends = torch.tensor([0, 2**32 - 1])
    low, high = _unit_interval(ends, ends).tolist()
    assert low == 2.0**-53 and high == 1 - 2.0**-53


def test_normal_numbers_of_the_first_and_the_last_word_are_finite():
    ends = torch.tensor([0, 2**32 - 1])
    cosine, sine = (lane.double() for lane in _box_muller(ends, ends))
    radius = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64).log().mul(-2).sqrt()
    torch.testing.assert_close(cosine, radius, rtol=1e-7, atol=0)  # both angles are nearly none
    angle = 2 * math.pi * 2.0**-33
    torch.testing.assert_close(sine, radius * torch.tensor([angle, -angle]), rtol=1e-6, atol=0)


def test_numbers_do_not_depend_on_the_batch_they_are_drawn_in():
    position, point = torch.tensor([3, 2**33, 10, 3]), torch.tensor([0, 1, 5, 2])
    whole = normal(1, "noise", position, point, (3, 5, 7))
    assert whole.shape == (4, 3, 5, 7) and whole.dtype == torch.float32
    flat_uniform = uniform(1, "noise", position, point, 3)
    for i in range(4):
        alone = normal(1, "noise", position[i : i + 1], int(point[i]), (3, 5, 7))
        assert torch.equal(whole[i], alone[0])
        assert torch.equal(flat_uniform[i], uniform(1, "noise", position[i : i + 1], int(point[i]), 3)[0])
    assert torch.equal(whole[0].flatten()[:10], normal(1, "noise", position[:1], 0, (10,))[0])
    assert normal(1, "noise", position[:0], 0, (2, 3)).shape == (0, 2, 3)


def test_every_part_of_the_key_and_counter_matters():
    def draw(seed=1, stream="noise", position=5, point=0):
        return normal(seed, stream, torch.tensor([position]), point, (4,))[0]

    base = draw()
    others = (draw(seed=2), draw(stream="time"), draw(position=6), draw(position=5 + 2**32), draw(point=1))
    for other in others:
        assert not torch.isclose(base, other).any()


def test_normal_numbers_are_standard_normal_and_independent():
    n = 64
    x = normal(7, "noise", torch.arange(n), 0, (1024,)).double()
    flat = x.flatten().numpy()
    assert scipy.stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / flat.size)
    assert abs(scipy.stats.kurtosis(flat)) < 5 * math.sqrt(24 / flat.size)
    limit = 5 / math.sqrt(x.numel())
    lanes = np.corrcoef(x.reshape(-1, 4).T.numpy())
    assert np.abs(lanes - np.eye(4)).max() < 2 * limit  # a quarter of the samples per lane
    squares = np.corrcoef(x.reshape(-1, 4).square().T.numpy())
    assert np.abs(squares - np.eye(4)).max() < 2 * limit
    other_point = normal(7, "noise", torch.arange(n), 1, (1024,)).double()
    other_stream = normal(7, "rollout", torch.arange(n), 0, (1024,)).double()
    for y in (other_point, other_stream, x.roll(1, 0), x.roll(1, 1)):
        assert abs(float((x * y).mean())) < limit


def test_uniform_numbers_are_uniform():
    x = uniform(7, "time", torch.arange(20000), 0, 2)
    assert x.dtype == torch.float64 and x.shape == (20000, 2)
    for column in x.T:
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(x.T.numpy())[0, 1]) < 5 / math.sqrt(20000)


def test_balanced_numbers_are_uniform_and_spread_over_neighbours():
    position = torch.arange(2**33 - 256, 2**33 + 256)
    x = balanced(7, "guidance", position)
    for k in range(7):  # every block of 2^k: one number in each 2^k-th part
        parts = (x * 2**k).floor().long().view(-1, 2**k)
        assert torch.equal(parts.sort(dim=1).values, torch.arange(2**k).expand_as(parts))
    assert torch.equal(balanced(7, "guidance", position[5:9]), x[5:9])
    # each alone is uniform and does not follow from its place: over blocks, which have their own coins
    pairs = torch.arange(1000)[:, None] * 64 + torch.tensor([6, 7])
    over_blocks = balanced(7, "guidance", pairs.flatten()).view(-1, 2)
    for column in over_blocks.T:
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    halves = over_blocks > 0.5
    assert bool((halves[:, 0] != halves[:, 1]).all()) and 400 < int(halves[:, 0].sum()) < 600
