"""QK norm and rotary embedding against float64 and diffusers, forward and every gradient, eager and interpreted."""

import pytest
import torch
from guards import assert_close, worst
from qk_cases import case, outcome

from soar_mega.kernels.qk_norm_rope import _checked, plain_qk_norm_rope, qk_norm_rope
from soar_mega.kernels.tables import LAUNCHES, Launch

# tokens, samples, heads, head size, rotary: several ragged blocks; a head size that is no power of two; batch 1
CASES = [((7, 2, 3, 16), True), ((7, 2, 3, 16), False), ((5, 3, 1, 12), True), ((3, 1, 2, 64), True)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few lines per block, and fewer programs than blocks."""
    table = {name: {"any": Launch(128, 4)} for name in LAUNCHES["qk_norm_rope"]}
    monkeypatch.setitem(LAUNCHES, "qk_norm_rope", table)
    monkeypatch.setattr("soar_mega.kernels.qk_norm_rope.PROGRAMS", 2)
    _checked.known.clear()
    yield
    _checked.known.clear()


@pytest.mark.parametrize(("shape", "rotary"), CASES)
def test_matches_float64(backend, shape, rotary):
    for name, (mine, theirs) in outcome(shape, rotary, torch.float32).items():
        assert_close(mine, theirs, name)


@pytest.mark.parametrize(("shape", "rotary"), CASES[:2])
def test_bf16_matches_float64(interpreted, shape, rotary):
    for name, (mine, theirs) in outcome(shape, rotary, torch.bfloat16).items():
        assert_close(mine, theirs, name)


def test_equals_flux_in_diffusers(backend):
    from diffusers.models.embeddings import FluxPosEmbed, apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    (query, key, query_weight, key_weight), _, _ = case((6, 2, 3, 16), False)
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=-1)
    tables = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])(ids)
    found = qk_norm_rope(query, key, query_weight, key_weight, *(t.float().contiguous() for t in tables))
    for mine, x, weight in zip(found, (query, key), (query_weight, key_weight)):
        norm = RMSNorm(16, eps=1e-6)
        norm.weight.data.copy_(weight)
        theirs = apply_rotary_emb(norm(x).transpose(0, 1), tables, sequence_dim=1)  # [B, S, heads, D]
        assert worst(mine.detach(), theirs.detach().transpose(0, 1)) < 1e-6


def test_a_gradient_may_lie_otherwise_in_memory(backend):
    inputs, _, gradients = case((7, 2, 3, 16), False)
    outputs = qk_norm_rope(*inputs)
    strided = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in gradients]
    found = torch.autograd.grad(outputs, inputs, strided, retain_graph=True)
    for mine, theirs in zip(found, torch.autograd.grad(outputs, inputs, gradients)):
        assert worst(mine, theirs) < 5e-7


def test_heads_beyond_two_to_the_31_elements(interpreted):
    import probes

    out = torch.empty(1, dtype=torch.int64)
    probes.strided_kernel[(1,)](torch.tensor([70000], dtype=torch.int32), out, 65536)
    assert out.item() == 3 * 70000 * 65536


def test_the_eager_twin_is_the_plain_code_to_the_bit():
    inputs, tables, _ = case((7, 2, 3, 16), True, torch.bfloat16)
    for mine, theirs in zip(qk_norm_rope(*inputs, *tables), plain_qk_norm_rope(*inputs, *tables)):
        assert torch.equal(mine, theirs)


HEADS, WEIGHT, TABLE = torch.zeros(4, 2, 3, 8), torch.zeros(8), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(4, 2, 8, 3).transpose(2, 3)},
            "query must be contiguous along its last dimension",
        ),
        ({"query": HEADS.double()}, "query must be float32 or bfloat16 or float16, not float64"),
        ({"query": HEADS[:0]}, "query is empty"),
        ({"query": HEADS[..., :7]}, "query must have an even head size D, not 7"),
        ({"key": HEADS[:, :1]}, r"key must be of shape \[4, 2, 3, 8\], not \[4, 1, 3, 8\]"),
        ({"key": HEADS.bfloat16()}, "key must be float32, not bfloat16"),
        ({"key": HEADS.to("meta")}, "key must be on cpu"),
        ({"query_weight": WEIGHT[:4]}, r"query_weight must be of shape \[8\]"),
        ({"key_weight": torch.zeros(16)[::2]}, "key_weight must be contiguous"),
        ({"cosine": None}, "cosine and sine go together"),
        ({"sine": TABLE.bfloat16()}, "sine must be float32, not bfloat16"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "query": HEADS,
        "key": HEADS,
        "query_weight": WEIGHT,
        "key_weight": WEIGHT,
        "cosine": TABLE,
        "sine": TABLE,
    }
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**good, **change})
