"""vLLM: the plugin that lives in the engine, and the client that speaks to it.

In the engine's processes (nothing here that trains):

    plugin      entry point; gives every worker its methods and switches an engine side on
    settings    what ``additional_config["drafttrain"]`` may say
    worker      the engine side of one worker: its versions, its tap, its swapper
    tap         engine thread: what a step computed and sampled, handed on
    assembler   background thread: steps become rollouts, rollouts become spool segments
    head        the policy's embedding and output head, and how its hidden states are laid out
    swap        a registry version into the running drafter, or the old one back
    cpu_sampler a correction of vLLM's CPU fallback, without which sampling is wrong there
    control     the two HTTP routes without a web framework, shared by routes and local
    routes      ... in ``vllm serve``
    local       ... for an in-process ``LLM``

On both sides of the wire: ``messages``. Beside the engine: ``client``.
"""
