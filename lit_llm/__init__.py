"""lit_llm: train language models with methods that need more than one model, or more than a loss on logits."""

from lit_llm.models.moe_config import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
