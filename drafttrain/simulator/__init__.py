"""What speculation would bring to an RL run that does not exist yet.

Two layers, each to be read on its own:

- one engine step, from sizes and rates (``roofline``, with ``models`` and ``hardware``), or as
  fitted from an engine's own timings (:mod:`drafttrain.control.economics`);
- one RL step, event by event: continuous batching in a ``fleet`` of engines whose batches shrink as
  long responses straggle, and the ``pipeline`` of generation and training, with a lag or without.

``scenario`` is what the user describes, ``acceptance`` how drafts are accepted, ``study`` the
questions that are answered, ``report`` and ``plots`` how. ``calibration`` holds the model against
published figures.
"""
