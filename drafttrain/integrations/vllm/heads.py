"""An eagle3 drafter that ships an ``lm_head`` keeps it; to be arranged before models are loaded.

vLLM 0.32 replaces it by the policy's when the two are equal, as in a drafter initialised from its
policy: no trained head could then ever be loaded without overwriting the policy's. This can go when
sharing becomes an option.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_OWN = "has_own_lm_head"
_KEPT = "_drafttrain_kept"


def keep_own_head(proposer: Any) -> None:
    """In the V1 runner (``v1/spec_decode/llm_base_proposer.py``, ``_maybe_share_lm_head``), which
    is called with a policy that has no head to share."""
    share: Callable[[Any], None] = proposer._maybe_share_lm_head

    def share_only_if_absent(target: Any) -> None:
        own = getattr(proposer.model, _OWN, False)
        share(SimpleNamespace(model=target.model) if own else target)

    proposer._maybe_share_lm_head = share_only_if_absent


def keep_own_head_v2() -> None:
    """In the V2 runner (``v1/worker/gpu/spec_decode/eagle/utils.py``, ``_should_share``), for every
    engine of this process; harmless when repeated."""
    from vllm.v1.worker.gpu.spec_decode.eagle import utils

    share: Callable[..., bool] = utils._should_share
    if hasattr(share, _KEPT):
        return

    def share_only_if_absent(model: Any, flag: str, draft: Any, target: Any) -> bool:
        own = flag == _OWN and getattr(model, flag, False) and draft is not None
        return not own and share(model, flag, draft, target)

    setattr(share_only_if_absent, _KEPT, True)
    utils._should_share = share_only_if_absent
