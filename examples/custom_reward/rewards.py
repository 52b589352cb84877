"""A reward that pays for the right answer, and a little for saying it briefly."""

from dasd_megatron.samples import Sample


def brief(sample: Sample) -> float:
    """Return 1 for a right answer, and up to 0.2 more the fewer tokens it took. A wrong answer gets 0, however brief it
    is."""
    return sample.reward * (1.0 + 0.2 / (1.0 + len(sample.sampled) / 16))


def explained(sample: Sample) -> tuple[float, str | None]:
    """Return the verifier's reward, and what is wrong with a wrong answer, for ``teacher.privileged=[feedback]``.

    It names neither the right answer nor the way to it.
    """
    if sample.reward > 0:
        return sample.reward, None
    if sample.predicted_answer is None:
        return 0.0, "No answer was found in the response."
    return 0.0, f"{sample.predicted_answer} is not the answer."
