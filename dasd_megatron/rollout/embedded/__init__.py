"""The embedded rollout server: SGLang 0.5.23's native HTTP API over transformers on the CPU, in its own process.

``python -m dasd_megatron.rollout.server --model-path DIR --port 30000`` serves any Hugging Face causal LM directory.
Field names, answers and error bodies are those of SGLang 0.5.23, so that a client written for one works against the
other. The embedded server differs on purpose in these points:

- A token id outside the vocabulary, lists of unequal length and ``n < 1`` get a 400. SGLang answers 500 or goes down.
- Known parameters that change the distribution or the answer and are not implemented here (penalties, grammars,
  ``min_p``, ``stop_regex``, streaming, LoRA, images, ...) get a 400 when they are set. They are never ignored. Unknown
  fields are treated as by SGLang: ignored at the top level, refused inside ``sampling_params``.
- ``sampling_seed`` always counts. SGLang reads it only under ``--enable-deterministic-inference`` (42 where it is
  absent) and ignores it otherwise. With ``n > 1`` and a seed, all n samples carry the same seed and are identical, in
  SGLang and here. Distinct samples of one prompt under a seed are n rows with n seeds.
- A prompt may fill the context but for one token. SGLang keeps up to seven tokens of it for itself.
- Sizes, counts and times have limits (docs/rollout.md). SGLang has few. Integers that do not fit into 64 bits and
  negative ``top_logprobs_num`` get a 400, and infinite log-probs of barred tokens are null.
- ``/abort_request`` ends the one request of this id. SGLang ends all whose ids begin so. Suspended requests end at
  once here, and in SGLang when generation goes on.
- There is no prefix cache: ``cached_tokens`` is 0, and ``/flush_cache`` only checks that nothing is running.
- ``/update_weights_from_tensor`` takes buckets in shared memory alone, and what it cannot read gets a 400. SGLang's
  process ends.
- Requests get a 400 while memory is released, and after a release of the weights until they have been sent again.
  SGLang tries to answer. ``/release_memory_occupation`` while requests run, and ``/resume_memory_occupation`` of what
  is not released, get a 400. SGLang goes down.
- ``/weights_checker`` has the action ``checksum`` alone, and Hugging Face's names of tensors. SGLang has its own names.
- An update over a process group or out of memory gathers weights beside the served ones. ``/end_weight_update``
  replaces these.
- Sequences that ``pause_generation`` suspends go on under the weights of an update that comes meanwhile. In mode
  ``retract`` their keys and values are computed anew. In mode ``in_place`` they stay those of the old weights, for
  which SGLang needs ``flush_cache=false``.

From the ground up: ``sampling``, ``schema``, ``requests``, ``batch``, ``loading``, ``replies``, ``decoder`` and
``engine`` know nothing of HTTP; ``bodies`` reads requests, ``app`` has the routes, ``connections`` limits clients, and
``server`` is the process.
"""
