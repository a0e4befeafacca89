"""One of two processes with two frozen models whose layers are divided: they evaluate differently often, then answer together.

    python -m tests.frozen_turns MODEL BATCHES BATCHES      # with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

BATCHES are those of each process. Prints, line by line: the largest difference of hidden states from those of whole models, the
share of the decoder layers that the process keeps, and whether answers are those of a whole model.
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lit_llm.models.divided_frozen import DividedFrozen
from lit_llm.models.language_model import Frozen, LanguageModel, ModelSpec
from lit_llm.models.surgery import layer_stack

PROMPTS = [[5, 6], [7, 8, 9]]


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, world = dist.get_rank(), dist.get_world_size()
    wholes = [ModelSpec(source=sys.argv[1]).load().eval() for _ in range(2)]
    nn.init.normal_(wholes[1].transformer.get_input_embeddings().weight)
    method = nn.ModuleList(Frozen(copy.deepcopy(whole)) for whole in wholes)
    frozen = DividedFrozen(method, init_device_mesh("cpu", (world,)))
    models, gaps = [holder.model for holder in method], [0.0]

    def compare(number: int, ids: list[int]) -> None:
        ours, theirs = (body(m, ids) for m in (models[number], wholes[number]))
        gaps.append((ours - theirs).abs().max().item())

    @torch.inference_mode()  # as Lightning evaluates
    def evaluate() -> None:
        batches = int(sys.argv[2 + rank])
        frozen.take_turns(batches)
        for batch in range(batches):
            # another order in each process, and one of them runs a model twice
            for number in [rank, 1 - rank, 0][: 2 + rank]:
                compare(number, [5 + batch, 6, 7 + rank])
            frozen.batch_done()

    for _ in range(2):
        evaluate()
        with torch.no_grad():
            compare(0, [9, 8, 7 + rank])  # a training step: all processes, equally often
    print(max(gaps))
    print(sum(map(kept, models)) / sum(p.numel() for m in wholes for p in layer_stack(m.transformer).parameters()))
    # all answer, but not equally long
    answers = [model.generate(PROMPTS[: 1 + rank], max_new_tokens=4 - rank) for model in (models[0], wholes[0])]
    print(answers[0] == answers[1])
    assert kept(models[0]) < kept(wholes[0])  # divided again
    dist.destroy_process_group()


def body(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return model.transformer.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state


def kept(model: LanguageModel) -> int:
    """Numbers of the decoder layers that are in this process."""
    parameters = layer_stack(model.transformer).parameters()
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)


if __name__ == "__main__":
    main()
