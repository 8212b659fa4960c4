"""vLLM: the plugin that lives in the engine, and the client that speaks to it.

In the engine's processes (nothing here that trains)::

    plugin       entry point: worker methods, and the hooks that switch an engine side on
    settings     what ``additional_config["drafttrain"]`` may say
    worker       the engine side of one worker; owns what follows
      versions     which policy and which drafter it runs
      tap          the engine's thread: what it computed (runners) and sampled, on a queue (steps)
      assembler    a thread: steps become rollouts (live), those to be kept (selection) segments
      head         the policy's embedding and output head, and the layout of its hidden states
      swap         a registry version into the running drafter, or the old one back (fit, ranks,
                   layerwise)
      transfer     the same, for those who use vLLM's own weight updates
    heads        a drafter keeps its own output head
    cpu_sampler  a correction of vLLM's CPU fallback, without which sampling is wrong there

In front of them, both carrying ``control``: ``routes`` in ``vllm serve``, ``local`` (with
``turnstile``) for an in-process ``LLM``. Beside them, in any process: ``client``. ``messages`` is
what the two sides say to each other.
"""
