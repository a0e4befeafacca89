"""The routed layer: against golden vectors and a slow float64 reference, its dispatch, its gradients, its records."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_llm.models import dispatch
from lit_llm.models.experts import Classifier, RoutedMLP, Router, collect_routing
from lit_llm.models.mlp_kinds import mlp_kind
from tests.golden import experts_cases
from tests.golden.golden import Case, change_largest_value, family_folder, read_index
from tests.models.small_experts import KINDS, GatedMLP, LengthUnknown, PlainMLP, experts_one_by_one, routed
from tests.reference.layer_moe_experts import routed_layer, row_gate, token_gate

FOLDER = family_folder("layer_moe")
CASES = {name: entry for name, entry in read_index(FOLDER).items() if entry["kind"] in experts_cases.HANDLERS}


def check_golden(entry, folder, dtype):
    case = Case(entry, folder, dtype)
    experts_cases.HANDLERS[entry["kind"]](case)
    case.finish()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_vectors_of_routed_layers_and_classifiers_come_out(name, dtype):
    check_golden(CASES[name], FOLDER, dtype)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_changed_golden_tensor_is_noticed(name, tmp_path):
    shutil.copy(FOLDER / CASES[name]["file"], tmp_path)
    changed = change_largest_value(tmp_path, CASES[name])
    with pytest.raises(AssertionError, match=changed.replace(".", r"\.")):
        check_golden(CASES[name], tmp_path, torch.float64)


# --------------------------------------------------------------- the formula


@pytest.mark.parametrize("layer", [RoutedMLP, LengthUnknown], ids=["exact", "fixed length"])
@pytest.mark.parametrize("classifier", [None, "token", "sequence_sum"])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_all_experts_computed_densely(kind, k, classifier, layer):
    if layer is LengthUnknown:  # grouped products do not take float64
        block, tolerance = routed(kind, k=k, classifier=classifier, layer=layer, backend="grouped"), 2e-5
    else:
        block, tolerance = routed(kind, k=k, classifier=classifier, dtype=torch.float64), 1e-11
    torch.manual_seed(3)
    x = torch.randn(3, 7, 16, dtype=block.router.weight.dtype, requires_grad=True)
    cotangent = torch.randn_like(x)
    with collect_routing(block) as records:
        y = block(x)
    y.backward(cotangent)

    wide = copy.deepcopy(block).double()
    theirs = x.detach().double().requires_grad_()
    alone = None
    if classifier is not None:
        gate, given = (token_gate, theirs.flatten(0, 1)) if classifier == "token" else (row_gate, theirs)
        logits, alone = gate(given, wide.classifier.weight)
        torch.testing.assert_close(records[0].classifier_logits.double(), logits, rtol=0, atol=tolerance * 10)
        assert alone.any() and not alone.all()
    experts = [expert.requires_grad_() for expert in experts_one_by_one(wide)]
    expected, mixture = routed_layer(theirs.flatten(0, 1), wide.router.weight, experts, k, True, alone)
    wide.router.weight.grad = None
    expected.backward(cotangent.flatten(0, 1).double())
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, rtol=0, atol=tolerance * 10)
    torch.testing.assert_close(records[0].mixture_MN.double(), mixture, rtol=0, atol=tolerance)
    assert records[0].counts_N.tolist() == (mixture > 0).sum(0).tolist()
    torch.testing.assert_close(x.grad.double(), theirs.grad, rtol=0, atol=tolerance * 10)
    torch.testing.assert_close(block.router.weight.grad.double(), wide.router.weight.grad, rtol=0, atol=tolerance * 50)
    for ours, grad in zip(gradients_one_by_one(block), (gradient_of(expert) for expert in experts[1:])):
        torch.testing.assert_close(ours.double(), grad, rtol=0, atol=tolerance * 100)


def gradients_one_by_one(block):
    """Gradients of the added experts, each as one vector, weights in the layout of their stacks."""
    for bank in block.experts.values():
        for index in range(bank.count):
            yield torch.cat([parameter.grad[index].flatten() for parameter in bank.parameters()])


def gradient_of(expert):
    kind = mlp_kind(expert)
    parts = []
    for names in (kind.inputs, (kind.output,)):
        for name in names:
            layer = getattr(expert, name)
            grad = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
            parts.append((grad if type(layer) is nn.Linear else grad.T).flatten())
    biases = []
    for name in (*kind.inputs, kind.output):
        layer = getattr(expert, name)
        if getattr(layer, "bias", None) is not None:
            biases.append(torch.zeros_like(layer.bias) if layer.bias.grad is None else layer.bias.grad)
    return torch.cat(parts + biases)


@pytest.mark.parametrize("classifier", [None, "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_dispatch_agree(kind, dtype, classifier):
    blocks = [
        routed(kind, dtype=dtype, classifier=classifier, backend="loop"),
        routed(kind, dtype=dtype, classifier=classifier, backend="grouped"),
        routed(kind, dtype=dtype, classifier=classifier, backend="grouped", layer=LengthUnknown),
    ]
    torch.manual_seed(1)
    x = torch.randn(2, 9, 16).to(dtype)
    cotangent = torch.randn(2, 9, 16).to(dtype)
    results = []
    for block in blocks:
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        y.backward(cotangent)
        trained = (block.experts, block.router)
        results.append([y, leaf.grad, *(parameter.grad for part in trained for parameter in part.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for other in results[1:]:
        for ours, theirs in zip(other, results[0]):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_two_runs_give_the_same_bits():
    x = torch.randn(4, 33, 16)
    results = []
    for _ in range(2):
        block = routed(counts=(5,), k=3)
        y = block(x.clone().requires_grad_())
        y.sum().backward()
        results.append([y, block.router.weight.grad, block.experts["1"].gate_up_proj.grad])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


# ------------------------------------------------- unequal and empty experts


def send_everything_to(block, expert):
    """A router that likes one expert best, whatever the token, and the original second."""
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.weight[expert, 0], block.router.weight[0, 0] = 9.0, 1.0
    return torch.cat([torch.ones(2, 5, 1), torch.randn(2, 5, 15)], -1)


@pytest.mark.parametrize("layer", [RoutedMLP, LengthUnknown])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_an_expert_without_tokens_takes_part_with_a_gradient_of_zero(kind, backend, layer):
    if (layer, backend) == (LengthUnknown, "loop"):
        pytest.skip("the loop reads the counts")
    block = routed(kind, counts=(3, 1), backend=backend, layer=layer)
    x = send_everything_to(block, 2)
    with collect_routing(block) as records:
        block(x).square().sum().backward()
    assert records[0].counts_N.tolist() == [10, 0, 10, 0, 0]
    for parameter in block.experts["1"].parameters():
        assert parameter.grad[1].any() and not parameter.grad[0].any() and not parameter.grad[2].any()
    for parameter in block.experts["2"].parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_one_token_alone_is_routed_as_among_others():
    block = routed(dtype=torch.float64)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    together = block(x)
    alone = torch.cat([block(x[:, t : t + 1]) for t in range(6)], 1)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_where_the_classifier_passes_every_token_by_all_that_trains_still_has_a_gradient():
    block = routed(classifier="token")
    with torch.no_grad():
        block.classifier.weight.zero_()
        block.classifier.weight[0] = 50.0
    x = torch.rand(2, 5, 16) + 0.1
    y = block(x)
    torch.testing.assert_close(y, block.base(x))
    y.sum().backward()
    trained = [*block.experts.parameters(), block.router.weight, block.classifier.weight]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_the_classifier_is_in_the_graph_without_a_loss_of_its_own():
    block = routed(classifier="token")
    block(torch.randn(2, 5, 16)).sum().backward()
    assert block.classifier.weight.grad is not None and not block.classifier.weight.grad.any()
    assert block.router.weight.grad.any()


def test_a_token_that_is_judged_old_is_computed_once():
    block = routed(classifier="token", counts=(4,))
    rows = {"base": 0, "new": 0}
    block.base.register_forward_pre_hook(lambda _, inputs: rows.update(base=rows["base"] + len(inputs[0])))
    block.experts["1"].register_forward_pre_hook(lambda _, inputs: rows.update(new=rows["new"] + len(inputs[0])))
    x = torch.randn(2, 20, 16)
    with collect_routing(block) as records:
        block(x)
    old = int(records[0].bypass_M.sum())
    assert 0 < old < 40
    assert rows["base"] + rows["new"] == old + 2 * (40 - old) == int(records[0].counts_N.sum())


# ------------------------------------------------------ exactly the dense MLP


@pytest.mark.parametrize("classifier", [None, "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_give_the_dense_output_to_the_last_bit_also_while_they_learn(kind, classifier):
    block = copies(kind, classifier)
    x = torch.randn(3, 11, 16)
    dense = block.base(x)
    with torch.no_grad():
        assert torch.equal(block(x), dense)
    y = block(x)
    assert torch.equal(y, dense) and y.requires_grad
    y.square().sum().backward()
    assert all(parameter.grad.any() for parameter in block.experts.parameters())


def copies(kind="gated", classifier=None, **settings):
    block = routed(kind, classifier=classifier, **settings)
    for bank in block.experts.values():
        bank.copy(block.base)
    return block


def test_gradients_of_copies_are_those_of_the_mixture():
    block = copies(dtype=torch.float64)
    x, cotangent = torch.randn(2, 8, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    block(x).backward(cotangent)
    experts = [expert.requires_grad_() for expert in experts_one_by_one(block)]
    router = block.router.weight.detach().clone().requires_grad_()
    expected, _ = routed_layer(x.flatten(0, 1), router, experts, 2)
    expected.backward(cotangent.flatten(0, 1))
    torch.testing.assert_close(block.router.weight.grad, router.grad, rtol=0, atol=1e-12)
    for ours, grad in zip(gradients_one_by_one(block), (gradient_of(expert) for expert in experts[1:])):
        torch.testing.assert_close(ours, grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("through", ["optimizer", "data"])
def test_the_first_update_of_an_expert_counts_however_it_is_written(through):
    block, x = copies(), torch.randn(2, 8, 16)
    if through == "optimizer":
        block(x).square().sum().backward()
        torch.optim.SGD(block.parameters(), 0.1).step()
    else:
        block(x)
        block.experts["2"].down_proj.data[1] += 0.5
    changed = experts_one_by_one(block)
    expected, _ = routed_layer(x.flatten(0, 1), block.router.weight, changed, 2)
    torch.testing.assert_close(block(x).flatten(0, 1), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(block(x), block.base(x), atol=1e-4)


def test_without_renormalisation_one_expert_per_token_does_not_start_as_the_dense_layer():
    block = copies(k=1, renormalise=False)
    x = torch.randn(2, 8, 16)
    with collect_routing(block) as records:
        y = block(x)
    scale = records[0].gates_Mk.view(2, 8, 1)
    assert (scale < 1).all()
    torch.testing.assert_close(y, block.base(x) * scale)


def test_dropout_belongs_to_the_expert():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    block = RoutedMLP(GPT2MLP(32, GPT2Config(n_embd=16, n_head=2, resid_pdrop=0.5)))
    block.add_experts(1, 3)
    block.set_router(torch.Generator().manual_seed(0))
    x = torch.randn(2, 200, 16)
    assert torch.equal(block.eval()(x), block.base(x))
    y = block.train()(x)
    assert 0.2 < (y == 0).float().mean() < 0.3  # both slots of a number are dropped in a quarter of all cases
    block.base.dropout.p = 0.0
    assert torch.equal(block(x), block.base(x))


# ---------------------------------------------------------- types and devices


def test_routers_and_classifiers_stay_in_float32_when_the_model_does_not():
    block = routed(classifier="token")
    before = block.router.weight.detach().clone()
    for half in (block.bfloat16, block.half, lambda: block.to(torch.bfloat16)):
        half()
        assert torch.equal(block.router.weight, before) and block.classifier.weight.dtype == torch.float32
    assert block.experts["1"].gate_up_proj.dtype == torch.bfloat16
    assert block.double().router.weight.dtype == torch.float64
    block = routed(classifier="token").bfloat16()
    with collect_routing(block) as records:
        y = block(torch.randn(2, 5, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert records[0].router_logits_MN.dtype == records[0].classifier_logits.dtype == torch.float32


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_autocast_computes_experts_in_its_type_and_routers_in_float32(backend):
    block = routed(backend=backend, classifier="token")
    x = torch.randn(2, 5, 16)
    full = block(x)
    with torch.autocast("cpu", torch.bfloat16), collect_routing(block) as records:
        y = block(x)
    assert y.dtype == torch.bfloat16 and records[0].router_logits_MN.dtype == torch.float32
    torch.testing.assert_close(y.float(), full, rtol=5e-2, atol=5e-2)
    y.float().square().sum().backward()
    assert block.experts["1"].gate_up_proj.grad.dtype == torch.float32


def test_grouped_products_are_refused_in_words_where_they_do_not_work():
    x = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="'grouped'.*float64.*'loop'"):
        routed(dtype=torch.float64, backend="grouped")(x.double())
    odd = routed(hidden=15, backend="grouped")
    with pytest.raises(ValueError, match="15 numbers.*16 bytes"):
        odd(torch.randn(1, 4, 15))
    odd.backend = "auto"
    odd(torch.randn(1, 4, 15))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert dispatch.backend("grouped", torch.float32, cpu, (16, 32)) == "grouped"
    assert dispatch.backend("auto", torch.float32, cpu, (16, 32)) == "loop"
    assert dispatch.backend("auto", torch.float32, gpu, (15, 32)) == "loop"
    assert dispatch.backend("auto", torch.float64, gpu, (16, 32)) == "loop"


def test_segments_of_fixed_length_hold_what_exact_ones_hold():
    torch.manual_seed(0)
    experts = torch.stack([torch.randperm(7)[:2] for _ in range(30)])  # 6 stands for none
    exact = dispatch.segments(experts, [1, 3, 2], on_host=True)
    fixed = dispatch.segments(experts, [1, 3, 2], on_host=False)
    slots = torch.arange(60).view(30, 2)
    for ours, theirs in zip(fixed, exact):
        length = len(theirs.token_n)
        assert ours.counts is None and sum(theirs.counts) == length <= len(ours.token_n)
        assert torch.equal(ours.token_n[:length], theirs.token_n) and torch.equal(ours.ends_E, theirs.ends_E)
        inside = ours.inside_Mk
        assert torch.equal(ours.slot_n[ours.position_Mk[inside]], slots[inside]) and int(inside.sum()) == length
        assert theirs.in_order and not ours.in_order
    assert sum(len(part.slot_n) for part in exact) == int((experts < 6).sum())


class Poisoned(torch.autograd.Function):
    """Puts NaN where a grouped product leaves memory as it was: beyond the last end, forward and backward."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        return Poisoned.tail(rows, end)

    @staticmethod
    def backward(ctx, grad):
        return Poisoned.tail(grad, ctx.end), None

    @staticmethod
    def tail(rows, end):
        return torch.cat([rows[:end], torch.full_like(rows[end:], float("nan"))])


@pytest.mark.parametrize("classifier", [None, "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_the_rows_of_a_segment_reaches_nothing(kind, classifier, monkeypatch):
    def results():
        block = routed(kind, classifier=classifier, backend="grouped", layer=LengthUnknown)
        torch.manual_seed(2)
        x = torch.randn(2, 9, 16, requires_grad=True)
        y = block(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for part in (block.experts, block.router) for p in part.parameters())]

    clean, product = results(), torch.nn.functional.grouped_mm
    ends = []

    def poisoning(rows, weights, offs):
        ends.append(int(offs[-1]) < len(rows))
        return Poisoned.apply(product(Poisoned.apply(rows, int(offs[-1])), weights, offs=offs), int(offs[-1]))

    monkeypatch.setattr(dispatch.F, "grouped_mm", poisoning)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(), clean))
    assert any(ends)


# ------------------------------------------------------------ the classifier


@pytest.mark.parametrize("scope", ["token", "sequence_sum"])
def test_a_gate_by_label_follows_labels_in_training_only(scope):
    block = routed(classifier=scope)
    block.classifier.gate = "label"
    labels = torch.tensor([[0, 1, 2, 0, 1], [1, 0, 0, 0, 2]])
    x = torch.randn(2, 5, 16)
    with collect_routing(block, token_labels=labels) as records:
        block(x)
    by_row = torch.tensor([True, False])[:, None].expand(2, 5)
    assert torch.equal(records[0].bypass_M.view(2, 5), labels == 0 if scope == "token" else by_row)
    with pytest.raises(ValueError, match="'label'.*token_labels"):
        block(x)
    block.eval()
    block(x)


def test_a_class_per_group_of_languages_limits_how_far_its_tokens_are_routed():
    block = routed(counts=(2, 2), dtype=torch.float64)
    block.classifier = Classifier(16, reach=(1, 3, 5)).double()
    block.classifier.reset(torch.Generator().manual_seed(0))
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    with collect_routing(block) as records:
        y = block(x).flatten(0, 1)
    judged = records[0].classifier_logits.argmax(-1)
    experts, tokens = experts_one_by_one(block), x.flatten(0, 1)
    for group, reach in enumerate((1, 3, 5)):
        chosen = judged == group
        assert 5 < chosen.sum() < 60
        expected, _ = routed_layer(tokens[chosen], block.router.weight[:reach], experts[:reach], 2)
        torch.testing.assert_close(y[chosen], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"reach is \(2, 3\)"):
        Classifier(16, reach=(2, 3))


def test_the_threshold_moves_the_decision():
    block = routed(classifier="token").eval()
    x = torch.randn(2, 50, 16)
    shares = []
    for threshold in (0.1, 0.5, 0.9):
        block.classifier.threshold = threshold
        with collect_routing(block) as records:
            block(x)
        shares.append(records[0].bypass_M.float().mean().item())
    assert shares[0] > shares[1] > shares[2]
    with pytest.raises(ValueError, match="threshold is 1"):
        Classifier(16, threshold=1.0)


def test_routers_start_as_published_and_do_not_depend_on_the_global_generator():
    router = Router(40, 600)
    router.reset(torch.Generator().manual_seed(5))
    assert abs(router.weight.std().item() - (2 / 640) ** 0.5) < 1e-3
    torch.manual_seed(99)
    again = Router(40, 600)
    again.reset(torch.Generator().manual_seed(5))
    assert torch.equal(router.weight, again.weight)


# ----------------------------------------------------------------- collecting


class TwoLayers(nn.Module):
    """Two routed layers with residuals, the blocks perhaps recomputed in the backward pass."""

    def __init__(self, use_reentrant=None, gate="predicted"):
        super().__init__()
        self.blocks = nn.ModuleList(routed(seed=seed, classifier="token") for seed in range(2))
        for index, block in enumerate(self.blocks):
            block.layer_index, block.classifier.gate = index, gate
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant))
        return x


@pytest.mark.parametrize("inside", [False, True], ids=["backward after the block", "backward inside the block"])
@pytest.mark.parametrize("gate", ["predicted", "label"])
def test_recomputed_layers_leave_one_record_and_the_same_gradients(gate, inside):
    torch.manual_seed(0)
    x, labels = torch.randn(2, 6, 16), torch.randint(0, 2, (2, 6))
    gradients = []
    for use_reentrant in (None, False):
        model = TwoLayers(use_reentrant, gate)
        leaf = x.clone().requires_grad_()
        with collect_routing(model, token_labels=labels) as records:
            y = model(leaf)
            if inside:
                loss_of(y, records).backward()
        assert sorted(records) == [0, 1]
        if not inside:
            loss_of(y, records).backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*gradients):
        assert torch.equal(ours, theirs)


def loss_of(y, records):
    auxiliary = sum(
        record.router_logits_MN.logsumexp(-1).sum() + record.classifier_logits.square().sum()
        for record in records.values()
    )
    return y.square().sum() + auxiliary


def test_reentrant_checkpointing_is_refused_where_losses_would_lose_their_gradients():
    model = TwoLayers(use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), collect_routing(model):
        model(torch.randn(2, 6, 16, requires_grad=True))


def test_records_end_with_the_block():
    block = routed()
    x = torch.randn(2, 5, 16)
    with collect_routing(block) as records:
        block(x)
    before = records[0]
    block(x)
    assert records[0] is before and block.collector is None
    with pytest.raises(RuntimeError, match="Layer 0 ran twice"), collect_routing(block):
        block(x)
        block(x)


def test_padding_is_left_out_of_counts():
    block = routed(classifier="token")
    x, mask = torch.randn(2, 6, 16), torch.ones(2, 6)
    mask[1, 2:] = 0
    with collect_routing(block, mask=mask) as records:
        block(x)
    kept = records[0].mixture_MN[mask.flatten().bool()]
    assert records[0].counts_N.tolist() == (kept > 0).sum(0).tolist()


def test_collecting_what_is_not_there_is_refused_in_words():
    with pytest.raises(ValueError, match="no routed layer"), collect_routing(nn.Linear(2, 2)):
        pass
    block = routed()
    labels = torch.zeros(1, 6)
    with (
        pytest.raises(ValueError, match="for 6 positions.*layer 0 sees 10"),
        collect_routing(block, token_labels=labels),
    ):
        block(torch.randn(2, 5, 16))


# ---------------------------------------------------------------- other MLPs


def test_an_mlp_with_known_parts_but_another_formula_is_refused():
    class Squared(GatedMLP):
        def forward(self, x):
            return super().forward(x).square()

    with pytest.raises(ValueError, match="Squared has the projections of a gated MLP.*not supported"):
        RoutedMLP(Squared(16, 32))
    with pytest.raises(ValueError, match=r"Sequential has the parts \['0'\]"):
        RoutedMLP(nn.Sequential(nn.Linear(4, 4)))


def test_biases_of_gated_mlps_are_copied():
    base = GatedMLP(16, 32, bias=True)
    nn.init.normal_(base.gate_proj.bias)
    block = RoutedMLP(base)
    block.add_experts(1, 2)
    block.set_router(torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        block.experts["1"].down_proj_bias += 1.0
    with collect_routing(block) as records:
        y = block(x)
    added = records[0].mixture_MN[:, 1:].sum(-1).view(2, 5, 1)
    torch.testing.assert_close(y, base(x) + added, rtol=0, atol=1e-5)


def test_experts_per_token_below_one_is_refused():
    with pytest.raises(ValueError, match="experts_per_token is 0"):
        RoutedMLP(PlainMLP(8, 16), experts_per_token=0)
