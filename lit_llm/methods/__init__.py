"""Training methods. Importing this package is what makes their short names known to the command line."""

from lit_llm.methods.dskd import DSKD
from lit_llm.methods.kd import KD
from lit_llm.methods.sft import SFT

__all__ = ["DSKD", "KD", "SFT"]
