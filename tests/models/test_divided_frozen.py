"""Frozen models whose layers are divided among processes, which run them equally often, or in turns, or together."""

import pytest
import torch
from torch import nn

from lit_llm.models.divided_frozen import DividedFrozen
from lit_llm.models.language_model import Frozen, ModelSpec
from tests.processes import in_two_processes
from tests.tiny import tiny_model_folder


@pytest.mark.parametrize("batches", [(3, 1), (0, 2), (2, 2), (0, 0)], ids=str)
def test_processes_take_turns_however_many_batches_each_has(tmp_path, batches):
    model = tiny_model_folder(tmp_path / "model", family="llama", layers=3, hidden_size=16)
    done = in_two_processes("-m", "tests.frozen_turns", model, *batches)
    assert done.returncode == 0, done.stderr[-2000:]
    for gap, share, answered in zip(*[iter(done.stdout.split())] * 3, strict=True):
        assert float(gap) < 1e-6  # of products in another order
        assert float(share) == pytest.approx(0.5, abs=0.02)
        assert answered == "True"


class Mesh:
    """All that is asked of a mesh before anything is divided."""

    device_type = "cpu"

    def get_group(self):
        return None


def test_a_method_without_a_frozen_model_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"divide_frozen is true, but ModuleList holds no frozen model"):
        DividedFrozen(nn.ModuleList(), Mesh())


def test_quantised_models_are_refused(tmp_path):
    model = ModelSpec(source=str(tiny_model_folder(tmp_path / "model"))).load()
    layer = model.transformer.base_model.layers[0]
    layer.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match=r"packed of a frozen model is torch.uint8"):
        DividedFrozen(nn.ModuleList([Frozen(model)]), Mesh())
