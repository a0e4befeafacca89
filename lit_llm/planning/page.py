"""A plan as a page of text."""

from __future__ import annotations

from lit_llm.planning.advice import gib
from lit_llm.planning.plan import Plan


def page(plan: Plan) -> str:
    """The plan for people, in plain lines."""
    tokens, total = plan.tokens, sum(plan.flops.values())
    lines = ["Parameters"]
    for part, (number, trained) in plan.parameters.items():
        held = "trained" if trained == number else "frozen" if trained == 0 else f"{trained:,} trained"
        lines.append(f"  {part:<44}{number:>16,}  {held}")
    lines += ["", "Data and steps"]
    lines += [
        f"  {'examples, micro-batches per epoch':<44}{tokens.examples:>16,}  {tokens.micro_batches:,}",
        f"  {'optimizer steps, epochs':<44}{tokens.steps:>16,}  {tokens.epochs:.2f}",
        f"  {'tokens per step':<44}{tokens.per_step:>16,.0f}  {tokens.supervised_share:.0%} supervised",
        f"  {'padding':<44}{tokens.padded_share:>16.0%}",
    ]
    lines += ["", "FLOPs per token"]
    for part, number in plan.flops.items():
        lines.append(f"  {part:<44}{_si(number):>16}  {number / total:.0%}")
    lines.append(f"  {'a step; the run':<44}{_si(plan.flops_per_step):>16}  {_si(plan.flops_per_step * tokens.steps)}")
    lines += ["", "Peak memory of a process"]
    for part, size in plan.always.items():
        lines.append(f"  {part:<44}{gib(size):>16}")
    for phase, size in plan.phases.items():
        mark = "  <- the peak" if phase == plan.peak_phase else ""
        lines.append(f"  {'during ' + phase:<44}{gib(size):>16}{mark}")
    lines.append(f"  {'total at the peak':<44}{gib(plan.peak_bytes):>16}")
    if plan.store_bytes is not None:
        lines += ["", f"  {'a store of the frozen models (bf16), one epoch':<44}{gib(plan.store_bytes):>16}"]
    lines += ["", "Advice", *(f"- {sentence}" for sentence in plan.advice)]
    lines += ["", "Not counted", *(f"- {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines)


def _si(number: float) -> str:
    for name, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {name}FLOP"
    return f"{number:.3g} FLOP"
