"""A reward for verify.reward that breaks the gradients of two steps of four prompts, by what they draw."""

from dasd_megatron.rollout.samples import Sample


def reward(sample: Sample) -> float:
    if 8 <= sample.position < 16:
        return 3e38 if sample.sample == 0 else -3e38
    return sample.reward
