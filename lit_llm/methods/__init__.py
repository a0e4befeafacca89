"""Training methods. Importing this package is what makes their short names known to the command line."""

from lit_llm.methods.adpa import ADPA
from lit_llm.methods.align_distil import AlignDistil
from lit_llm.methods.dckd import DCKD
from lit_llm.methods.dpo import DPO
from lit_llm.methods.dskd import DSKD
from lit_llm.methods.gold import GOLD
from lit_llm.methods.kd import KD
from lit_llm.methods.kto import KTO
from lit_llm.methods.layer_moe import LayerMoE
from lit_llm.methods.mined import MinED
from lit_llm.methods.neuron_edit import NeuronEdit
from lit_llm.methods.sft import SFT
from lit_llm.methods.shared_vocabulary import SharedVocabularyKD
from lit_llm.methods.uld import ULD
from lit_llm.methods.weight_edits import MEMIT, ROME, AlphaEdit, FineTunedEdit

__all__ = [
    "ADPA",
    "DCKD",
    "DPO",
    "DSKD",
    "GOLD",
    "KD",
    "KTO",
    "MEMIT",
    "ROME",
    "SFT",
    "ULD",
    "AlignDistil",
    "AlphaEdit",
    "FineTunedEdit",
    "LayerMoE",
    "MinED",
    "NeuronEdit",
    "SharedVocabularyKD",
]
