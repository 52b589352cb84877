"""Sampling that gives each response which did not come to an end a second chance."""

from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.collector import Generate, RolloutRequest


async def finish_once_more(request: RolloutRequest, generate: Generate) -> list[Completion]:
    """One response for each of ``sampling_params``; those cut short by the length limit are drawn once more, with other
    seeds.

    The policy is then trained on what it says when it comes to an end: a bias, which one may want.
    """
    params = request.sampling_params
    completions = await generate([request.prompt_ids] * len(params), params)
    cut = [index for index, completion in enumerate(completions) if completion.finish_reason == "length"]
    if cut:
        # A seed that depends on the first one alone: a run that is killed and resumed draws the same again.
        again = [{**params[index], "sampling_seed": params[index]["sampling_seed"] ^ 0x5BD1E995} for index in cut]
        for index, completion in zip(cut, await generate([request.prompt_ids] * len(cut), again), strict=True):
            completions[index] = completion
    return completions
