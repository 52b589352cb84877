"""A filter that keeps groups whose rewards differ and whose responses mostly come to an end."""

from collections.abc import Sequence

from dasd_megatron.samples import Sample


def neither_easy_nor_cut(group: Sequence[Sample]) -> bool:
    """Keep a group if its rewards differ, at most three quarters of its responses are right, and at most half of them
    were cut short by the length limit."""
    right = sum(sample.reward > 0 for sample in group)
    cut = sum(sample.finish_reason == "length" for sample in group)
    return 0 < right <= 0.75 * len(group) and cut <= 0.5 * len(group)
