"""The order of samples: even use, whatever the batch sizes, ranks and restarts."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.data.order import Order, Place
from soar_mega.flow import uniform


def global_batch(order: Order, place: Place, count: int) -> tuple[list[tuple[str, int]], Place]:
    stretch, after = order.step(place, count)
    return [(stretch.bucket, int(m)) for m in order.members(stretch)], after


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.dictionaries(st.sampled_from(["16x16", "12x20", "20x12"]), st.integers(1, 23), min_size=1),
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_use_counts_differ_by_at_most_one_over_world_sizes_batch_sizes_and_restarts(sizes, runs, seed):
    """runs: (data-parallel ranks, samples per rank, steps); between two runs all is rebuilt from a checkpoint."""
    used: Counter[tuple[str, int]] = Counter()
    saved = json.dumps({"consumed": 0, "streams": {}})
    positions: list[int] = []
    for ranks, per_rank, steps in runs:
        orders = [Order(seed, sizes) for _ in range(ranks)]
        places = [Place(**json.loads(saved))] * ranks
        for _ in range(steps):
            for rank, order in enumerate(orders):
                stretch, places[rank] = order.step(places[rank], ranks * per_rank)
                part = stretch.part(rank, ranks)
                used.update((part.bucket, int(m)) for m in order.members(part))
                positions += part.positions().tolist()
            for bucket, size in sizes.items():
                counts = [used[bucket, member] for member in range(size)]
                assert max(counts) - min(counts) <= 1
        assert all(place == places[0] for place in places)
        saved = json.dumps({"consumed": places[0].consumed, "streams": dict(places[0].streams)})
    assert positions == list(range(len(positions)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_a_global_batch_is_the_same_at_every_number_of_ranks(ranks):
    order = Order(7, {"16x16": 50, "12x20": 20})
    stretch, _ = order.step(Place(consumed=12, streams={"16x16": 47}), 6)
    whole = order.members(stretch).tolist()
    parts = [stretch.part(rank, ranks) for rank in range(ranks)]
    assert [m for part in parts for m in order.members(part).tolist()] == whole
    assert [p for part in parts for p in part.positions().tolist()] == list(range(12, 18))


def test_an_epoch_uses_each_sample_once_and_the_next_is_shuffled_anew():
    order = Order(0, {"16x16": 100})
    first, place = global_batch(order, Place(), 100)
    second, _ = global_batch(order, place, 100)
    other_seed, _ = global_batch(Order(1, {"16x16": 100}), Place(), 100)
    everything = [("16x16", i) for i in range(100)]
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(everything), tuple(first), tuple(second), tuple(other_seed)}) == 4


def test_a_batch_may_cross_several_epochs_of_a_small_bucket():
    order = Order(0, {"16x16": 3})
    batch, _ = global_batch(order, Place(streams={"16x16": 2}), 8)
    assert sorted(batch[1:4]) == sorted(batch[4:7]) == [("16x16", i) for i in range(3)]


def test_two_epochs_of_each_bucket_are_kept_and_drawn_once():
    """A batch crosses from one into the next; an epoch of a large data set takes much memory, and time."""
    order, place = Order(0, {"16x16": 3, "12x20": 4}), Place()
    for _ in range(30):
        stretch, place = order.step(place, 3)
        order.members(stretch)
    assert Counter(bucket for bucket, _ in order._epochs) == {"16x16": 2, "12x20": 2}
    for key, members in dict(order._epochs).items():
        assert order._permutation(*key) is members


def test_buckets_come_in_proportion_to_their_sizes():
    order = Order(3, {"16x16": 600, "12x20": 300, "20x12": 100, "empty": 0})
    place, drawn = Place(), Counter()
    for _ in range(3000):
        stretch, place = order.step(place, 2)
        drawn[stretch.bucket] += 1
    # The standard error of a share is at most .009.
    assert drawn["16x16"] / 3000 == pytest.approx(0.6, abs=0.03)
    assert drawn["12x20"] / 3000 == pytest.approx(0.3, abs=0.03)
    assert set(drawn) == {"16x16", "12x20", "20x12"}
    named_otherwise = Order(3, dict(reversed(order.sizes.items())))
    for consumed in range(20):
        assert named_otherwise.step(Place(consumed=consumed), 2) == order.step(Place(consumed=consumed), 2)


def test_the_order_is_the_one_of_earlier_versions():
    """A run resumed with a newer version must go on in the same order."""
    order = Order(42, {"16x16": 10})
    assert order.members(order.step(Place(), 10)[0]).tolist() == [4, 0, 9, 8, 5, 3, 6, 1, 7, 2]


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Order(0, {"16x16": 0})


def test_an_epoch_drawn_in_blocks_is_the_keyed_order(monkeypatch):
    monkeypatch.setattr("soar_mega.data.order.BLOCK", 7)
    order = Order(3, {"16x16": 300})
    stretch, _ = order.step(Place(streams={"16x16": 600}), 300)
    numbers = uniform(3, "order/16x16", torch.arange(300), 2)[:, 0]
    assert order.members(stretch).tolist() == torch.argsort(numbers, stable=True).tolist()
