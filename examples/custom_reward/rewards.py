"""A reward that pays for the right answer, and a little for saying it briefly."""

from dasd_megatron.samples import Sample


def brief(sample: Sample) -> float:
    """Return 1 for a right answer, and up to 0.2 more the fewer tokens it took. A wrong answer gets 0, however brief it
    is."""
    return sample.reward * (1.0 + 0.2 / (1.0 + len(sample.sampled) / 16))
