"""One contender in one process: builds, then takes one step for every line on its standard input."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.workload import SETTINGS, Workload
from lit_llm.losses.scratch import release_scratch


def serve(task: dict) -> None:
    """Answer `ready`, then one JSON line per step: seconds, loss, gradient norm, peak memory above the loaded level.

    A line `memory` asks for a step whose memory is measured. It starts from an allocator that holds nothing, which takes
    time that other steps do not need, so its seconds are not those of training. A line `time` asks for two steps, of which
    the second is timed: training takes one step after another, while here others had their turn in between, and what they
    pushed out of caches and memory must first come back.

    Args:
        task: suite, contender, setting, threads, device, dtype, and `folder` of a checkout where one is needed.
    """
    torch.set_num_threads(task["threads"])
    contenders = importlib.import_module(f"benchmarks.{task['suite']}").CONTENDERS
    build = contenders[task["contender"]][0]
    work = Workload(SETTINGS[task["setting"]], task["device"], getattr(torch, task["dtype"]))
    step = build(work, task.get("folder"))
    meter = _CudaMeter() if task["device"].startswith("cuda") else _ResidentMeter()
    _answer({"ready": True})
    for line in sys.stdin:
        step.clear()
        gc.collect()
        if line.strip() == "memory":
            release_scratch()
            meter.start()
        else:
            step.loss()
            step.clear()
            gc.collect()
        start = time.perf_counter()
        loss = step.loss()
        meter.wait()
        seconds = time.perf_counter() - start
        _answer(
            {
                "seconds": seconds,
                "loss": float(loss),
                "gradient_norm": step.gradient_norm(),
                "extra_bytes": meter.extra() if line.strip() == "memory" else 0,
            }
        )


class _ResidentMeter:
    """Peak resident memory of this process above the level before the step."""

    def start(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
        self.before = _status("VmRSS")

    def wait(self) -> None:
        """A step on the CPU is over when it returns."""

    def extra(self) -> int:
        return _status("VmHWM") - self.before


class _CudaMeter:
    """Peak memory that torch's allocator handed out above the level before the step."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def extra(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; the memory of a step is measured on Linux only.")


def _answer(content: dict) -> None:
    sys.stdout.write("@" + json.dumps(content) + "\n")
    sys.stdout.flush()
