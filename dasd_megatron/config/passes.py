"""The passes of a training step."""

from __future__ import annotations

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.config.schema import Config


def why_scored_first(config: Config) -> str | None:
    """Return why the policy scores its rollouts in a forward pass of its own before the update, as a clause for people;
    None where the update's own forward pass scores them too.

    That pass has what scoring would compute, as long as the weights are those that scoring would see, the rollouts of a
    micro-batch are whole, and nothing that the loss needs of one rollout depends on the scores of others.
    """
    batch, loss, algorithm = config.batch, config.loss, config.algorithm
    if loss.share_pass == "never":
        return "loss.share_pass=never"
    if batch.minibatches * batch.epochs > 1:
        return f"batch.minibatches x batch.epochs = {batch.minibatches * batch.epochs} updates share the scores"
    if config.parallel.context_parallel_size > 1:
        return "context parallelism splits the rollouts, and routing needs whole ones"
    if loss.rejects:
        return "rejection decides which tokens the whole batch is averaged over"
    if METHODS[algorithm.name].has_mean_one:
        return f"algorithm.name={algorithm.name} divides weights by their mean over the whole batch"
    if algorithm.is_distributional and algorithm.top_k_of("student") is not None:
        return "algorithm.divergence_top_k_of=student: the teacher needs the policy's entries first"
    return None
