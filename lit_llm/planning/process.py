"""Memory of a process before it holds any model: Python, libraries, and what they allocate at their first use."""

from __future__ import annotations

import gc
import os
import platform
import sys

import torch

from lit_llm.methods.base import Method


def framework_bytes(method: Method) -> int:
    """Resident size of this process once everything is imported that a step of training imports."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoModelForCausalLM

    for spec in (method.student_spec, getattr(method, "teacher_spec", None)):
        if spec is not None and spec.source is not None:
            from lit_llm.planning.bodies import _config

            AutoModelForCausalLM._model_mapping[type(_config(spec.source))]
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(256, 256)).square().mean().backward()
    optimizer.step()
    gc.collect()
    return resident_bytes()


def keeps_freed_blocks() -> bool:
    """Whether the C library of this process keeps freed blocks below 32 MiB: glibc, where nobody has told it otherwise."""
    told = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not told and "malloc" not in os.environ.get("LD_PRELOAD", "")


def resident_bytes() -> int:
    """Memory of this process that is in use now; where the system does not tell, its maximum so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _page_size()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _page_size() -> int:
    import resource

    return resource.getpagesize()
