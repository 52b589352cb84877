from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_megatron.data.order import DataOrder

SIZES, SEEDS, SHUFFLE = st.integers(1, 13), st.integers(0, 2**40), st.booleans()


@given(SIZES, SEEDS, SHUFFLE, st.lists(st.integers(0, 30), max_size=8))
def test_batches_join_into_whole_epochs(size, seed, shuffle, batches):
    order, position, sequence = DataOrder(size, seed, shuffle), 0, []
    for count in batches:
        batch = order.indices(position, count)
        assert len(batch) == count
        sequence += batch
        position += count
    for start in range(0, len(sequence) - size + 1, size):
        assert sorted(sequence[start : start + size]) == list(range(size))
    tail = sequence[len(sequence) // size * size :]
    assert len(set(tail)) == len(tail)


@given(SIZES, SEEDS, SHUFFLE, st.integers(0, 1000), st.integers(0, 40), st.integers(0, 40))
def test_a_new_object_resumes_at_any_position(size, seed, shuffle, position, first, second):
    whole = DataOrder(size, seed, shuffle).indices(position, first + second)
    assert DataOrder(size, seed, shuffle).indices(position, first) == whole[:first]
    assert DataOrder(size, seed, shuffle).indices(position + first, second) == whole[first:]


def test_epochs_and_seeds_differ():
    order = DataOrder(50, 1)
    first, second = order.indices(0, 50), order.indices(50, 50)
    assert len({tuple(first), tuple(second), tuple(DataOrder(50, 2).indices(0, 50)), tuple(range(50))}) == 4


def test_order_is_fixed_across_processes_and_versions():
    assert DataOrder(6, 3).indices(4, 6) == [3, 0, 1, 2, 0, 4]


def test_without_shuffle_the_order_is_the_files():
    assert DataOrder(3, 5, shuffle=False).indices(1, 6) == [1, 2, 0, 1, 2, 0]


def test_indices_are_plain_integers():
    assert all(type(index) is int for index in DataOrder(4, 0).indices(0, 9))


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 1), "num_problems"), ((-1, 1), "num_problems"), ((1, -1), "seed")]
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataOrder(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 1), (0, -1)])
def test_bad_positions_are_refused(arguments):
    with pytest.raises(ValueError, match="must not be negative"):
        DataOrder(3, 1).indices(*arguments)
