"""Watching another process's memory from outside."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.train.memory.trace import Tracker
from equipot.train.memory.watch import Watch

GROW = """
import pathlib, os, sys, time
home, size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(home / f"pid-{os.getpid()}").touch()
time.sleep(0.5)
grown = bytearray(os.urandom(1)) * size
time.sleep(0.5)
del grown
"""


def test_the_peak_of_two_processes_is_seen(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 2)
    thread = threading.Thread(target=watch.run)
    thread.start()
    size = 60_000_000
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", GROW, str(tmp_path), str(size)]) for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    watch.stop()
    thread.join()
    lowest = min(sample.own for sample in watch.samples)
    assert max(sample.own for sample in watch.samples) - lowest == pytest.approx(2 * size, rel=0.15)
    assert watch.peak >= max(sample.own for sample in watch.samples)


def test_a_tracker_follows_storages_and_work() -> None:
    tracker = Tracker("cpu")
    with tracker, tracker.phase("first"), tracker.making("activations"):
        x = torch.ones(100, 50)
        view = x.t()
        product = view @ x
    tracker.call_it(product, "gradients")
    del product
    timeline = tracker.timeline()
    assert timeline.peak() == {"activations": 4 * 100 * 50, "gradients": 4 * 50 * 50} or timeline.peak() == {
        "activations": 4 * (100 * 50 + 50 * 50)
    }
    assert timeline.total[-1] == 4 * 100 * 50
    assert timeline.flops[-1] == 2 * 50 * 100 * 50
    assert set(np.unique(timeline.phase)) == {"", "first"}
