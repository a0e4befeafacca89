"""What may not be set of a frozen model."""

from __future__ import annotations

from lit_llm.models.language_model import ModelSpec


def check_frozen(role: str, spec: ModelSpec | None) -> None:
    """See that nothing is set of a frozen model that only a trained one could use.

    Args:
        role: its name in the config.
        spec: of the model; None is fine.

    Raises:
        ValueError: adapters, or recomputed activations.
    """
    if spec is None:
        return
    if spec.lora is not None:
        raise ValueError(
            f"model.{role}.lora is set, but the model is frozen and its adapters would start at random. Leave it out: name "
            f"the folder `model/` or `adapters/` that a run with adapters left."
        )
    if spec.gradient_checkpointing:
        raise ValueError(
            f"model.{role}.gradient_checkpointing is true, but the model is frozen and has no backward pass. Leave it out."
        )
