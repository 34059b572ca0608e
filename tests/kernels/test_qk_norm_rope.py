"""Queries, keys and values of a joint attention against float64 and diffusers, forward and every gradient, eager and
interpreted.
"""

import pytest
import torch
from guards import assert_close, worst
from qk_cases import ALL, case, leaves, outcome

from soar_mega.kernels.qk_norm_rope import Projected, _checked, qk_norm_rope
from soar_mega.kernels.tables import LAUNCHES, Launch

# Several ragged blocks, and padding; heads in more than one block; a head size that is no power of two, batch 1; one
# stream alone; without a norm.
JOINT = (((7, 0), (3, 2)), 2, 3, 16)
CASES = [
    (JOINT, ALL),
    ((((2, 1), (3, 0)), 2, 10, 8), ("bias", "norm")),
    ((((5, 0), (1, 0)), 1, 1, 12), ("norm", "rotary")),
    ((((3, 4),), 2, 2, 64), ("norm",)),
    ((((3, 0),), 3, 2, 16), ("bias",)),
    ((((1, 0),), 1, 1, 8), ()),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few lines per block, and fewer programs than blocks."""
    table = {name: {"any": Launch(128, 4)} for name in LAUNCHES["qk_norm_rope"]}
    monkeypatch.setitem(LAUNCHES, "qk_norm_rope", table)
    monkeypatch.setattr("soar_mega.kernels.qk_norm_rope.PROGRAMS", 4)
    monkeypatch.setattr("soar_mega.kernels.qk_norm_rope.ROWS_EACH", 1)
    _checked.known.clear()
    yield
    _checked.known.clear()


@pytest.mark.parametrize(("shape", "has"), CASES)
def test_matches_float64(backend, shape, has):
    for name, (mine, theirs) in outcome(shape, has, torch.float32).items():
        assert_close(mine, theirs, name)


@pytest.mark.parametrize(("shape", "has"), [CASES[0], CASES[4]])
def test_bf16_matches_float64(interpreted, shape, has):
    for name, (mine, theirs) in outcome(shape, has, torch.bfloat16).items():
        assert_close(mine, theirs, name)


def test_equals_flux_in_diffusers(backend):
    from diffusers.models.embeddings import FluxPosEmbed, apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    (stream,), _, _ = case((((6, 0),), 2, 3, 16), ("norm",))
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=-1)
    tables = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])(ids)
    found = qk_norm_rope([stream], 16, *(t.float().contiguous() for t in tables))
    parts = stream.mixed.unflatten(-1, (3, 3, 16)).unbind(3)
    for mine, x, weight in zip(found, parts, stream[3:]):
        norm = RMSNorm(16, eps=1e-6)
        norm.weight.data.copy_(weight)
        theirs = apply_rotary_emb(norm(x).transpose(0, 1), tables, sequence_dim=1)  # [B, S, heads, D]
        assert worst(mine.detach(), theirs.detach().transpose(0, 1)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("shape", "has"), CASES[:2])
def test_written_where_the_caller_says(backend, shape, has):
    streams, tables, _ = case(shape, has)
    wanted = qk_norm_rope(streams, shape[-1], *tables)
    out = tuple(torch.full_like(x, torch.nan) for x in wanted)
    assert qk_norm_rope(streams, shape[-1], *tables, out=out)[0] is out[0]
    assert all(torch.equal(x, y) for x, y in zip(out, wanted, strict=True))
    with pytest.raises(ValueError, match=r"out\[1\] must be contiguous"):
        qk_norm_rope(
            streams,
            shape[-1],
            *tables,
            out=(out[0], out[1].transpose(0, 1).contiguous().transpose(0, 1), out[2]),
        )


@pytest.mark.parametrize("alike", [True, False])
def test_gradients_may_lie_otherwise_in_memory(backend, alike):
    """As attention returns them, heads before tokens; or each in another way."""
    streams, tables, gradients = case(*CASES[0])
    inputs = list(leaves(streams).values())
    outputs = qk_norm_rope(streams, 16, *tables)
    strided = [g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in gradients]
    if not alike:
        strided[1] = gradients[1].transpose(0, 1).contiguous().transpose(0, 1)
    found = torch.autograd.grad(outputs, inputs, strided, retain_graph=True)
    for mine, theirs in zip(found, torch.autograd.grad(outputs, inputs, gradients)):
        assert worst(mine, theirs) < 5e-7


def test_padding_and_what_is_frozen(backend):
    """Padding gets a gradient of zero, whatever is in it; a frozen bias costs no sum."""
    streams, tables, gradients = case(*CASES[0])
    image, text = streams[0], streams[1]._replace(bias=streams[1].bias.detach())
    with torch.no_grad():
        text.mixed[text.length :] = float("nan")
    outputs = qk_norm_rope([image, text], 16, *tables)
    found = torch.autograd.grad(outputs, [text.mixed, text.query_weight], gradients)
    assert not bool(found[0][text.length :].any()) and bool(found[0][: text.length].all())
    assert bool(found[1].isfinite().all())


def test_heads_beyond_two_to_the_31_elements(interpreted):
    import probes

    out = torch.empty(1, dtype=torch.int64)
    probes.strided_kernel[(1,)](torch.tensor([70000], dtype=torch.int32), out, 65536)
    assert out.item() == 3 * 70000 * 65536


MIXED, BIAS, WEIGHT, TABLE = torch.zeros(4, 2, 48), torch.zeros(48), torch.zeros(8), torch.zeros(8, 8)
GOOD = Projected(MIXED, 4, BIAS, WEIGHT, WEIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed": torch.zeros(4, 48, 2).transpose(1, 2)}, r"streams\[1\].mixed must be contiguous"),
        ({"mixed": MIXED.double()}, "mixed must be float32, not float64"),
        ({"mixed": MIXED[:, :1]}, r"mixed must be of shape \[S, 2, 48\], not \[4, 1, 48\]"),
        ({"mixed": MIXED.to("meta")}, "mixed must be on cpu"),
        ({"length": 5}, r"streams\[1\].length must be 1 to 4, the tokens of mixed, not 5"),
        ({"length": 0}, "length must be 1 to 4"),
        ({"bias": BIAS[:24]}, r"bias must be of shape \[48\]"),
        ({"query_weight": WEIGHT[:4]}, r"query_weight must be of shape \[8\]"),
        ({"key_weight": torch.zeros(16)[::2]}, "key_weight must be contiguous"),
        ({"key_weight": None}, "query_weight and .*key_weight go together"),
        ({"cosine": None}, "cosine and sine go together"),
        ({"cosine": TABLE[:4]}, r"cosine must be of shape \[8, 8\]"),
        ({"sine": TABLE.bfloat16()}, "sine must be float32, not bfloat16"),
        ({"head_size": 7}, "head_size must be even, not 7"),
        ({"head_size": 10}, "mixed must hold whole heads of 3 x 10, not 48 features"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"head_size": 8, "cosine": TABLE, "sine": TABLE}
    stream = GOOD._replace(**{name: value for name, value in change.items() if name not in arguments})
    arguments |= {name: value for name, value in change.items() if name in arguments}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope([GOOD, stream], **arguments)
