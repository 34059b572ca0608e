"""The keyed noise is the same numbers on a GPU."""

import torch

from soar_mega.flow import normal, uniform


def test_numbers_do_not_depend_on_the_device():
    position, point = torch.tensor([3, 2**33, 10]), torch.tensor([0, 1, 5])
    on_gpu = normal(1, "noise", position, point, (1000,), device="cuda")
    assert on_gpu.is_cuda
    torch.testing.assert_close(
        on_gpu.cpu(), normal(1, "noise", position, point, (1000,)), rtol=3e-7, atol=3e-7
    )
    assert torch.equal(uniform(1, "t", position.cuda(), point, 5).cpu(), uniform(1, "t", position, point, 5))
