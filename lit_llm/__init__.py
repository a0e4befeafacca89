"""lit_llm: train language models with methods that need more than one model, or more than a loss on logits."""

__version__ = "0.1.0"
