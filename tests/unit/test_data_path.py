"""The benchmark of the data path works, and its bars hold by a wide margin."""

from __future__ import annotations

from benchmarks import data_path


def test_columns_are_small_and_far_faster_to_save_and_read_than_lists() -> None:
    found = data_path.measure(32_768, rounds=1)
    sizes, ratios = found["bytes_a_token"], found["lists_to_columns"]
    assert sizes["columns"]["held"] <= 10 and sizes["columns"]["on_disk"] <= 12
    # Single rounds on a busy machine; ten and more are usual.
    assert ratios["save"] > 3 and ratios["read"] > 3 and ratios["log_probs"] > 3 and ratios["all"] > 1.5
