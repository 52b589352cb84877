"""Sampling that draws a response again if it did not come to an end."""

from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.collector import Generate, RolloutRequest


async def finish_once_more(request: RolloutRequest, generate: Generate) -> list[Completion]:
    """Draw one response for each of ``sampling_params``; responses cut short by the length limit are drawn once more,
    with other seeds.

    The policy is then trained on responses that come to an end more often than its own do. That is a bias, but it may
    be wanted.
    """
    params = request.sampling_params
    completions = await generate([request.prompt_ids] * len(params), params)
    cut = [index for index, completion in enumerate(completions) if completion.finish_reason == "length"]
    if cut:
        # The new seed depends on the first seed alone: a run that is killed and resumed draws the same again.
        again = [{**params[index], "sampling_seed": params[index]["sampling_seed"] ^ 0x5BD1E995} for index in cut]
        for index, completion in zip(cut, await generate([request.prompt_ids] * len(cut), again), strict=True):
            completions[index] = completion
    return completions
