"""Offline: from saved rollouts to a drafter in the registry.

``run`` is the loop, ``command`` what stands around it on the command line, ``memory`` the
prediction before it starts, ``report`` what is told at its end.
"""

from drafttrain.pretrain.run import Pretraining, PretrainReport, Progress, pretrain

__all__ = ["PretrainReport", "Pretraining", "Progress", "pretrain"]
