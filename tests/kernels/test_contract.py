"""What the SOAR operations refuse."""

import re

import pytest
import torch

from soar_mega.kernels import correction_loss, rollout_renoise

SHAPE = (3, 4, 6)


def sources():
    return [torch.randn(2, *SHAPE) for _ in range(6)]


def test_rows_beyond_two_to_the_31_elements(interpreted):
    """The one function that makes every row's offset, from an index that is narrower than its result."""
    import probes

    out = torch.empty(1, dtype=torch.int64)
    probes.row_offset_kernel[(1,)](torch.tensor([70000], dtype=torch.int32), out, 65536)
    assert out.item() == 70000 * 65536 > 2**31


ROWS = torch.ones(2, 1, 6, dtype=torch.float64)
POSITION = torch.tensor([1, 2])
WRONG = {
    "z0": [
        (
            lambda a: a.update(z0=torch.randn(2, *SHAPE).transpose(2, 3).contiguous().transpose(2, 3)),
            "contiguous",
        ),
        (lambda a: a.update(z0=torch.randn(2, *SHAPE, dtype=torch.float64)), "float32"),
        (lambda a: a.update(z0=torch.randn(2, 3, 24)), "shape"),
        (lambda a: a.update(z0=torch.randn(0, *SHAPE)), "empty"),
    ],
    "z1": [
        (lambda a: a.update(z1=torch.randn(1, *SHAPE)), "shape"),
        (lambda a: a.update(z1=torch.randn(2, *SHAPE, device="meta")), "meta"),
        (lambda a: a.update(z1=None), "missing"),
        (lambda a: a.update(draw=("z1",), position=POSITION), "given"),
    ],
    "v_cond": [(lambda a: a.update(v_cond=torch.randint(3, (2, *SHAPE))), "int64")],
    "eps": [(lambda a: a.update(eps=torch.randn(2, 3, 6, 4)), "shape")],
    "rows": [
        (lambda a: a.update(rows=ROWS.float()), "float64"),
        (lambda a: a.update(rows=ROWS[..., :5].contiguous()), "shape"),
        (lambda a: a.update(rows=ROWS.to("meta")), "cpu"),
    ],
    "sample": [
        (lambda a: a.update(rows=ROWS[:, 0]), "needed"),
        (lambda a: a.update(rows=ROWS[:, 0], sample=torch.tensor([0, 2])), "0 ... 1"),
        (lambda a: a.update(rows=ROWS[:, 0], sample=torch.tensor([-1, 1])), "0 ... 1"),
        (lambda a: a.update(rows=ROWS[:, 0], sample=torch.tensor([0.0, 1.0])), "int64"),
        (lambda a: a.update(sample=POSITION), "rows"),
    ],
    "path": [
        (lambda a: a.update(rows=ROWS[:, 0], sample=POSITION - 1, path=torch.tensor([0])), "shape"),
        (lambda a: a.update(path=POSITION), "rows"),
    ],
    "draw": [(lambda a: a.update(draw=("noise",), position=POSITION), "noise")],
    "position": [
        (lambda a: a.update(z1=None, draw=("z1",)), "needed"),
        (lambda a: a.update(z1=None, draw=("z1",), position=torch.tensor([1])), "shape"),
    ],
}


@pytest.mark.parametrize("operation", [rollout_renoise, correction_loss])
@pytest.mark.parametrize(
    ("name", "spoil", "says"), [(n, *case) for n, cases in WRONG.items() for case in cases]
)
def test_a_wrong_argument_is_named(operation, name, spoil, says):
    names = ("z0", "z1", "v_uncond", "v_cond", "eps", "z1_aux")
    arguments = dict(zip(names, sources())) | {"rows": ROWS}
    spoil(arguments)
    if operation is correction_loss:
        arguments["velocity"] = torch.randn(*arguments["rows"].shape[:-1], *SHAPE)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*{re.escape(says)}|{re.escape(says)}.*\b{name}\b"):
        operation(**arguments)


def test_wrong_arguments_of_one_operation():
    six = sources()
    given = {"eps": six[4], "z1_aux": six[5]}
    with pytest.raises(ValueError, match="patch_size"):
        rollout_renoise(*six[:4], ROWS, **given, patch_size=4)
    with pytest.raises(ValueError, match="dtype"):
        rollout_renoise(*six[:4], ROWS, **given, dtype=torch.int32)
    velocity = torch.randn(2, 1, *SHAPE)
    with pytest.raises(ValueError, match="velocity"):
        correction_loss(velocity[:, 0], *six[:4], ROWS, **given)
    with pytest.raises(ValueError, match="weight"):
        correction_loss(velocity, *six[:4], ROWS, **given, weight=torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="detach"):
        correction_loss(velocity, six[0].requires_grad_(), *six[1:4], ROWS, **given)
