"""Runs of elements as boxes."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from soar_mega.engines.saved_pieces import SavedPiece, boxes


@settings(deadline=None, max_examples=200)
@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), data=st.data())
def test_boxes_hold_each_element_of_a_run_once_and_in_order(shape, data):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = torch.arange(count).view(shape)
    found = []
    for offset, size in boxes(start, stop, shape):
        found += whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes(start, stop, shape))) <= max(1, 2 * len(shape) - 1)


def test_a_piece_of_a_shard_lies_at_its_place_in_the_whole():
    whole = torch.arange(24.0).view(4, 6)
    mine = whole[:, 3:].contiguous()  # the second of two tensor-parallel ranks
    shard = ShardedTensor.from_rank_offsets("w", mine, (1, 1, 2))
    piece = SavedPiece("optimizer.w", mine.view(-1)[2:8], 2, shard)
    filled = torch.full((4, 6), -1.0)
    for (row, column), box in piece.boxes():
        filled[row : row + box.shape[0], column : column + box.shape[1]] = box
    expected = torch.full((4, 6), -1.0)
    expected[0, 5], expected[1, 3:], expected[2, 3:5] = whole[0, 5], whole[1, 3:], whole[2, 3:5]
    assert torch.equal(filled, expected)
