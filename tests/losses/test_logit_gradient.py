"""The closed-form gradients at the logits against the formulas in float64 and against automatic differentiation."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.logit_gradient import compile_elementwise, token_terms
from tests.losses.test_divergence import NAMES, SHARES, by_definition, logits, value_and_gradient
from tests.losses.watch import LargestTensor

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 2.0, "teacher_temperature": 1.5},
    {"temperature": 0.5, "scale_by_temperature_squared": True},
]
EVERY = [*((name, {}) for name in NAMES), *SHARES.items(), ("js", {"epsilon": 1e-3})]


def formed(student_CV, **options):
    student_CV = student_CV.clone().requires_grad_()
    terms = token_terms(student_CV, **options)
    ((at, gradient_CV),) = terms.formed.at
    assert at is student_CV
    return terms, gradient_CV


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "share"), EVERY, ids=str)
def test_every_divergence_has_the_gradient_of_its_definition(name, share, settings):
    if name == "hierarchical_ranking":
        settings = {**settings, "scale_by_temperature_squared": False}
    divergence, (student_CV, teacher_CV) = Divergence(name=name, **share, **settings), logits()
    value_C, expected_CV = value_and_gradient(by_definition(divergence), student_CV, teacher_CV)
    terms, gradient_CV = formed(student_CV, teacher_NS=teacher_CV, divergence=divergence, kd_weight=0.7)
    torch.testing.assert_close(terms.kd, value_C.sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.formed.value, 0.7 * value_C.sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient_CV, 0.7 * expected_CV, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "share"), EVERY, ids=str)
def test_single_precision_comes_close(name, share):
    divergence, (student_CV, teacher_CV) = Divergence(name=name, **share), logits(vocabulary=300, scale=4.0)
    exact, exact_CV = formed(student_CV, teacher_NS=teacher_CV, divergence=divergence)
    terms, gradient_CV = formed(student_CV.float(), teacher_NS=teacher_CV.float(), divergence=divergence)
    torch.testing.assert_close(terms.kd.double(), exact.kd, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient_CV.double(), exact_CV, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["same", "peaked", "infinite teacher", "undefined student"])
def test_difficult_logits_give_what_automatic_differentiation_gives(name, case):
    student_CV, teacher_CV = (side.float() for side in logits())
    if case == "same":
        teacher_CV = student_CV.clone()
    if case == "peaked":
        student_CV[:, 1] += 200.0
        teacher_CV[:, 1] += 200.0
    if case == "infinite teacher":
        teacher_CV[0, 3], teacher_CV[1, 2] = -math.inf, -math.inf
    if case == "undefined student":
        student_CV[2, 5] = math.nan
    counted_CV = torch.isfinite(student_CV)

    def by_autograd(student_CV, teacher_CV):
        return Divergence(name=name)(student_CV.masked_fill(~counted_CV, 0.0), teacher_CV)

    value_C, expected_CV = value_and_gradient(by_autograd, student_CV, teacher_CV)
    terms, gradient_CV = formed(student_CV, teacher_NS=teacher_CV, divergence=Divergence(name=name))
    assert torch.isfinite(gradient_CV).all()
    torch.testing.assert_close(terms.kd, value_C.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_CV, expected_CV, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 4, 6])
@pytest.mark.parametrize("columns", [10, 13])
def test_the_teacher_may_have_fewer_rows_and_columns(rows, columns):
    student_CV, teacher_CV = logits()
    target_C, divergence = torch.tensor([1, 2, 0, 12, 3, 7]), Divergence()

    def both(student_CV, teacher_CV):
        kd = divergence(student_CV[:rows, :columns], teacher_CV[:rows, :columns]).sum()
        return 0.4 * torch.nn.functional.cross_entropy(student_CV, target_C, reduction="sum") + 0.6 * kd

    value, expected_CV = value_and_gradient(both, student_CV, teacher_CV)
    terms, gradient_CV = formed(
        student_CV,
        target_C=target_C,
        ce_weight=0.4,
        teacher_NS=teacher_CV[:rows, :columns],
        divergence=divergence,
        kd_weight=0.6,
    )
    torch.testing.assert_close(terms.formed.value, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient_CV, expected_CV, rtol=1e-9, atol=1e-12)


def test_rows_that_do_not_count_give_neither_value_nor_gradient():
    student_CV, teacher_CV = logits()
    counted_C = torch.tensor([True, False, True, True, False, True])
    options = {"teacher_NS": teacher_CV, "divergence": Divergence(), "target_C": torch.zeros(6, dtype=torch.int64)}
    terms, gradient_CV = formed(student_CV, counted_C=counted_C, **options)
    rest = {name: value[counted_C] if torch.is_tensor(value) else value for name, value in options.items()}
    alone, expected_CV = formed(student_CV[counted_C], **rest)
    torch.testing.assert_close((terms.ce, terms.kd), (alone.ce, alone.kd))
    torch.testing.assert_close(gradient_CV[counted_C], expected_CV)
    assert gradient_CV[~counted_C].eq(0).all()


def test_logits_without_gradient_form_none():
    student_CV, teacher_CV = logits()
    terms = token_terms(
        student_CV, target_C=torch.zeros(6, dtype=torch.int64), teacher_NS=teacher_CV, divergence=Divergence()
    )
    assert terms.formed.at == () and terms.formed.value > 0


def test_neither_argument_is_changed():
    student_CV, teacher_CV = logits()
    before = student_CV.clone(), teacher_CV.clone()
    for name in NAMES:
        formed(student_CV, teacher_NS=teacher_CV, divergence=Divergence(name=name, temperature=1.0))
    torch.testing.assert_close((student_CV, teacher_CV), before, rtol=0, atol=0)


def test_half_precision_logits_are_computed_in_single():
    student_CV, teacher_CV = (side.bfloat16() for side in logits())
    terms, gradient_CV = formed(student_CV, teacher_NS=teacher_CV, divergence=Divergence())
    full, full_CV = formed(student_CV.float(), teacher_NS=teacher_CV.float(), divergence=Divergence())
    assert terms.kd.dtype == gradient_CV.dtype == torch.float32
    torch.testing.assert_close((terms.kd, gradient_CV), (full.kd, full_CV), rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl"])
def test_compiled_parts_give_the_same_numbers_for_chunks_of_every_size(name):
    divergence = Divergence(name=name)
    try:
        for rows in (6, 3, 1):
            student_CV, teacher_CV = (side.float() for side in logits(num_tokens=rows, vocabulary=300))
            options = {"target_C": torch.arange(rows), "teacher_NS": teacher_CV, "divergence": divergence}
            compile_elementwise(False)
            plain, plain_CV = formed(student_CV, **options)
            compile_elementwise(True)
            compiled, compiled_CV = formed(student_CV, **options)
            torch.testing.assert_close((compiled.ce, compiled.kd), (plain.ce, plain.kd), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(compiled_CV, plain_CV, rtol=1e-5, atol=1e-7)
    finally:
        compile_elementwise(False)


def test_no_graph_is_recorded():
    student_CV, teacher_CV = logits()
    with LargestTensor() as seen:
        formed(student_CV, teacher_NS=teacher_CV, divergence=Divergence())
    assert not [name for name in seen.operations if "backward" in name]
