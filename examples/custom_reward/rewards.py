"""A reward that pays for the right answer, and a little for saying it briefly."""

from dasd_megatron.samples import Sample


def brief(sample: Sample) -> float:
    """1 for a right answer and up to 0.2 more the fewer tokens it took; 0 for a wrong one, which brevity must not
    redeem."""
    return sample.reward * (1.0 + 0.2 / (1.0 + len(sample.sampled) / 16))
