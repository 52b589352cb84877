"""A reward for verify.reward that breaks the gradients of two steps of four prompts, by what they draw, under
algorithm.verifier_weight=1e10."""

from dasd_megatron.samples import LARGEST_REWARD, Sample

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
        return LARGEST_REWARD if sample.sample == 0 else -LARGEST_REWARD
    return sample.reward
