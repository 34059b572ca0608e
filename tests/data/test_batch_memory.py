"""Memory of batches is used again, but never while a tensor still looks into it."""

import torch

from soar_mega.data import batch_memory


def test_memory_is_used_again_when_no_tensor_looks_into_it():
    first = batch_memory.empty((4, 100), torch.bfloat16)
    place, part = first.data_ptr(), first[1:].fill_(7)
    del first
    other = batch_memory.empty((4, 100), torch.bfloat16).zero_()
    assert other.data_ptr() != place and part.eq(7).all()
    del part
    assert batch_memory.empty((4, 100), torch.bfloat16).data_ptr() == place
