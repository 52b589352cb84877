"""A reward for verify.reward that breaks the gradients of two steps of four prompts, by what they draw."""

from dasd_megatron.samples import Sample

graded = 0


def fails_in_the_evaluation(sample: Sample) -> float:
    """After two steps of 16 samples."""
    global graded
    graded += 1
    if graded > 32:
        raise ValueError("out of order")
    return sample.reward


def reward(sample: Sample) -> float:
    if 8 <= sample.position < 16:
        return 3e38 if sample.sample == 0 else -3e38
    return sample.reward
