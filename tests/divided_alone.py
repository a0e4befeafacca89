"""One of two processes: the first one runs a model that FSDP divides by itself, then both make a step.

    python -m tests.divided_alone MODEL        # with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

Prints the largest difference of the step's gradients from those of the plain model.
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lit_llm.models.fully_sharded import divide, divided_by
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.sharding import gathered
from lit_llm.models.surgery import layer_stack

ROWS = ([5, 6, 7, 8], [9, 10, 11])


class Likelihood(nn.Module):
    """A method of one line, whose loss reads the head outside of its module."""

    def __init__(self, student: LanguageModel) -> None:
        super().__init__()
        self.student = student

    def training_step(self, ids: list[int]) -> torch.Tensor:
        ids_1L = torch.tensor([ids])
        hidden_LD = self.student.transformer.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
        return nn.functional.cross_entropy(self.student.head(hidden_LD[:-1]), ids_1L[0, 1:])


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, world = dist.get_rank(), dist.get_world_size()
    method = Likelihood(ModelSpec(source=sys.argv[1]).load())
    plain = copy.deepcopy(method)
    step = divide(method, layer_stack(method.student.transformer), init_device_mesh("cpu", (world,)))

    with gathered(method):
        if rank == 0:  # as where one process fills a store: it samples, and runs the model, more often than the others
            method.student.generate([[5, 6], [7, 8, 9]], max_new_tokens=4, batch_size=1)
            with torch.no_grad():
                for ids in ROWS:
                    method.training_step(ids)
    assert not any(group.is_unsharded for group in step._get_fsdp_state()._fsdp_param_groups)
    dist.barrier()
    assert divided_by(method.student) is step

    step(ROWS[rank]).backward()
    (sum(plain.training_step(ids) for ids in ROWS) / world).backward()
    wanted = dict(plain.named_parameters())
    gaps = [(p.grad.full_tensor() - wanted[name].grad).abs().max().item() for name, p in method.named_parameters()]
    print(max(gaps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
