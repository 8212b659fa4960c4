"""When finished rollouts become a file."""

from __future__ import annotations

import time
from pathlib import Path

from rollout_files import LAYOUT, make_rollout

from drafttrain.integrations.vllm.counters import Counters
from drafttrain.integrations.vllm.segments import Segments
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.rollouts.spool import SpoolReader, SpoolWriter


def test_an_idle_engine_writes_sooner_than_a_busy_one(tmp_path: Path) -> None:
    settings = EngineSettings(idle_seconds=0.05, busy_seconds=0.4)
    segments = Segments(SpoolWriter(tmp_path, "e"), settings, Counters())
    segments.layout = LAYOUT
    paths = SpoolReader(tmp_path).segment_paths
    assert segments.seconds_left(idle=True) is None
    segments.add(make_rollout(1), held_bytes=1)
    time.sleep(0.06)
    segments.write_due(idle=False)
    assert not paths()
    segments.write_due(idle=True)
    assert len(paths()) == 1
    segments.add(make_rollout(2), held_bytes=1)
    time.sleep(0.41)
    segments.write_due(idle=False)
    assert len(paths()) == 2
    assert segments.held_bytes == 0
