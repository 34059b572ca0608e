"""What a call costs the host: one check per layout, autograd only for gradients, no change of device."""

from unittest import mock

import pytest
import torch
from adaln_cases import case

from soar_mega.kernels import adaln as module
from soar_mega.kernels.adaln import adaln
from soar_mega.kernels.dispatch import check_tensor, define, launch, once_per_layout


def test_a_layout_is_checked_once_and_a_wrong_one_every_time():
    checked = []

    @once_per_layout
    def check(x, y):
        checked.append(x)
        check_tensor("x", x, shape=("N", 4))
        return "fine"

    good = torch.zeros(2, 4)
    for x, y in ((good, None), (good + 1, None), (good, good), (good.T.contiguous().T, None)):
        for _ in range(2):
            try:
                assert check(x, y) == "fine"
            except ValueError as error:
                assert "x must be contiguous" in str(error)
    others = (torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(2, 4, device="meta"), torch.zeros(3, 4))
    for x in (*others, *others):
        check(x, None)
    assert len(checked) == 1 + 1 + 2 + 3


def test_without_a_gradient_autograd_is_not_touched():
    seen = []
    operation = define(
        "double",
        forward=lambda x, factor: (x * factor, x),
        setup_context=lambda ctx, inputs, results: seen.append(results[1]),
        backward=lambda ctx, gradient: (gradient * 2, None),
        outputs=1,
    )
    x = torch.ones(3)
    (plain,) = operation(x, 2)
    with torch.no_grad():
        (also,) = operation(x.requires_grad_(), 2)
    assert plain.grad_fn is also.grad_fn is None and not seen
    (output,) = operation(x, 2)
    assert output.grad_fn is not None and len(seen) == 1
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    assert gradient.tolist() == [8.0] * 3  # 2 output * 2
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_device_is_changed_only_for_a_launch_elsewhere():
    kernel = mock.MagicMock()
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 1),
        mock.patch.object(torch.cuda, "device") as entered,
    ):
        launch(kernel, (3,), torch.device("cuda", 1), 7, num_warps=4)
        assert not entered.called
        launch(kernel, (3,), torch.device("cuda", 0), 7, num_warps=4)
        entered.assert_called_once_with(torch.device("cuda", 0))
    assert kernel.__getitem__.call_args_list == [mock.call((3,))] * 2
    assert kernel.__getitem__().call_args_list == [mock.call(7, num_warps=4)] * 2


def test_on_the_meta_device_the_launching_code_runs_and_computes_nothing():
    streams, vectors = case((5, 2, 8))
    residual, branch = (x.detach().to("meta").requires_grad_() for x in streams)
    shift, scale, gate = (x.detach().contiguous().to("meta").requires_grad_() for x in vectors)
    with mock.patch.object(module, "launch", wraps=launch) as launched:
        outputs = adaln(residual, shift, scale, branch, gate)
        found = torch.autograd.grad(outputs, [residual, shift, gate], outputs)
    assert [x.shape for x in (*outputs, *found)] == [residual.shape] * 3 + [shift.shape] * 2
    assert all(x.is_meta for x in (*outputs, *found)) and launched.call_count == 2
