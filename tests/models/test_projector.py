"""Projectors: the closed form, when it is formed anew, and cross-model attention against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_llm.models.projector import (
    ClosedFormStudentToTeacher,
    CrossModelAttention,
    Projector,
    ideal_projectors,
    scales,
    shared_rows,
)
from tests.reference import distillation as reference

V, W, D, E = 40, 50, 5, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def heads():
    return normal(V, D), normal(W, E, seed=1)


def test_the_closed_form_is_the_least_squares_solution(heads):
    student, teacher = heads
    ids = torch.arange(3, 33), torch.arange(9, 39).flip(0)
    to_student, to_teacher = ideal_projectors(*heads, shared_rows(*heads, *ids))
    ours, theirs = student[ids[0]], teacher[ids[1]]
    torch.testing.assert_close(to_student.weight, torch.linalg.pinv(ours) @ theirs)
    torch.testing.assert_close(to_teacher.weight, torch.linalg.pinv(theirs) @ ours)
    assert to_student.error == pytest.approx(float((ours @ to_student.weight - theirs).norm() / theirs.norm()))
    assert (to_student.kept, to_teacher.kept) == (D, E)


def test_a_head_that_was_built_from_the_other_is_reproduced_exactly():
    teacher = normal(W, E)
    student = teacher @ normal(E, D, seed=1)
    to_student, to_teacher = ideal_projectors(student, teacher, shared_rows(student, teacher))
    assert to_teacher.error < 1e-7
    assert to_student.error > 0.1
    h_s = normal(D, seed=2)
    torch.testing.assert_close(teacher @ (to_teacher.weight @ h_s), student @ h_s)


def test_directions_below_the_cutoff_are_dropped():
    left, _ = torch.linalg.qr(normal(W, E))
    teacher = left * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.2, 1e-3, 1e-4], dtype=torch.float64)
    student = normal(W, D)
    for rcond, kept in [(1e-5, 8), (5e-4, 7), (5e-3, 6), (0.3, 5)]:
        _, to_teacher = ideal_projectors(student, teacher, shared_rows(student, teacher), rcond=rcond)
        assert to_teacher.kept == kept
        expected = torch.linalg.pinv(teacher, rtol=rcond) @ student
        assert (to_teacher.weight - expected).norm() < 1e-6 * expected.norm()


def test_the_default_cutoff_is_that_of_the_released_code():
    left, _ = torch.linalg.qr(normal(W, E))
    cutoff = W * torch.finfo(torch.float32).eps
    for value, kept in [(1.1 * cutoff, E), (0.9 * cutoff, E - 1)]:
        teacher = left * torch.tensor([1.0] * (E - 1) + [value], dtype=torch.float64)
        _, to_teacher = ideal_projectors(normal(W, D), teacher, shared_rows(teacher, teacher))
        assert to_teacher.kept == kept


def test_centering_fits_distributions_better(heads):
    student, teacher = heads[0] + 3.0, heads[1] - 2.0
    shared = shared_rows(student, teacher)
    h_t = normal(30, E, seed=4)

    def gap(center: bool) -> float:
        to_student, _ = ideal_projectors(student, teacher, shared, center_heads=center)
        logits = h_t @ to_student.weight.T @ student.T, h_t @ teacher[:V].T
        projected, wanted = ((z - z.mean(-1, keepdim=True)) for z in logits)
        return float((projected - wanted).norm())

    assert gap(center=True) < gap(center=False)


def test_one_tokenizer_shares_the_rows_that_both_heads_and_the_tokenizer_have(heads):
    assert shared_rows(*heads).num == V
    assert shared_rows(*heads, num_tokens=30).num == 30
    assert shared_rows(*heads, topk=7).num == 7
    assert shared_rows(*heads, topk=1000).num == V


def test_the_most_frequent_shared_tokens_come_first(heads):
    ids = torch.arange(4, 20), torch.arange(16)
    shared = shared_rows(*heads, *ids, topk=6)
    to_student, _ = ideal_projectors(*heads, shared)
    torch.testing.assert_close(to_student.weight, torch.linalg.pinv(heads[0][4:10]) @ heads[1][:6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_K": torch.arange(3)}, "3 student ids and None"),
        ({"student_K": torch.arange(3), "teacher_K": torch.arange(4)}, "3 student ids and 4"),
        ({"student_K": torch.arange(0), "teacher_K": torch.arange(0)}, "share no token"),
        ({"topk": 0}, "topk_vocab is 0"),
    ],
)
def test_shared_tokens_that_make_no_sense_are_refused(heads, options, message):
    with pytest.raises(ValueError, match=message):
        shared_rows(*heads, **options)


@pytest.mark.parametrize("rcond", [0.0, 1e-9, 1.0])
def test_a_cutoff_that_cannot_be_resolved_is_refused(heads, rcond):
    with pytest.raises(ValueError, match="projectors.rcond"):
        ideal_projectors(*heads, shared_rows(*heads), rcond=rcond)


def test_a_projector_starts_from_the_closed_form_in_single_precision(heads):
    to_student, _ = ideal_projectors(*heads, shared_rows(*heads))
    projector = Projector(E, D, start=to_student)
    assert projector.weight.dtype == torch.float32
    torch.testing.assert_close(projector.weight.double(), to_student.weight, rtol=1e-6, atol=1e-6)
    hidden = normal(3, E).bfloat16()
    assert projector(hidden).dtype == torch.bfloat16
    torch.testing.assert_close(projector(hidden).float(), hidden.float() @ projector.weight.T, rtol=0.01, atol=0.01)


def test_a_start_of_another_shape_is_refused(heads):
    to_student, _ = ideal_projectors(*heads, shared_rows(*heads))
    with pytest.raises(ValueError, match="The start is"):
        Projector(D, E, start=to_student)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("ids", [(None, None), (torch.arange(5, 25), torch.arange(30, 50))])
def test_the_closed_form_map_follows_the_current_head(heads, ids, center):
    student, teacher = heads[0].requires_grad_(), heads[1]
    shared = shared_rows(student, teacher, *ids)
    _, to_teacher = ideal_projectors(student.detach(), teacher, shared, center_heads=center)
    s2t = ClosedFormStudentToTeacher(to_teacher.gram_inverse, shared, center_heads=center)
    hidden = normal(6, D, seed=7).requires_grad_()

    torch.testing.assert_close(s2t(hidden, student, teacher, step=0), hidden @ to_teacher.weight.T)
    with torch.no_grad():
        student += 1.0 + normal(V, D, seed=8)
    _, moved = ideal_projectors(student.detach(), teacher, shared, center_heads=center)
    output = s2t(hidden, student, teacher, step=1)
    torch.testing.assert_close(output, hidden @ moved.weight.T)

    output.sum().backward()
    assert student.grad is None
    torch.testing.assert_close(hidden.grad, moved.weight.sum(0).expand(6, D))


def test_the_closed_form_map_is_kept_while_the_step_stays(heads):
    student, teacher = heads
    shared = shared_rows(student, teacher)
    _, to_teacher = ideal_projectors(student, teacher, shared)
    s2t = ClosedFormStudentToTeacher(to_teacher.gram_inverse, shared)
    hidden = normal(6, D)
    first = s2t(hidden, student, teacher, step=3)
    student *= 2
    assert torch.equal(s2t(hidden, student, teacher, step=3), first)
    torch.testing.assert_close(s2t(hidden, student, teacher, step=4), 2 * first)


def test_converting_the_module_to_half_precision_does_not_reach_the_closed_form(heads):
    shared = shared_rows(*heads)
    s2t = ClosedFormStudentToTeacher(ideal_projectors(*heads, shared)[1].gram_inverse, shared)
    before = s2t.weight(*heads)
    assert torch.equal(s2t.bfloat16().weight(*heads), before)


def test_the_closed_form_map_has_nothing_to_train_or_to_save(heads):
    shared = shared_rows(*heads)
    s2t = ClosedFormStudentToTeacher(ideal_projectors(*heads, shared)[1].gram_inverse, shared)
    assert not list(s2t.parameters())
    assert not s2t.state_dict()


def test_a_map_of_single_precision_is_close_to_that_of_double(heads):
    shared = shared_rows(*heads)
    _, to_teacher = ideal_projectors(*heads, shared)
    s2t = ClosedFormStudentToTeacher(to_teacher.gram_inverse, shared)
    with torch.autocast("cpu", torch.bfloat16):
        found = s2t.weight(*(head.float() for head in heads))
    torch.testing.assert_close(found.double(), to_teacher.weight, rtol=1e-4, atol=1e-5)


@pytest.fixture
def attended():
    """Three sequences: 4 and 3, 2 and 5, and 0 and 2 supervised tokens."""
    torch.manual_seed(0)
    student_sequence_T, teacher_sequence_U = torch.tensor([0] * 4 + [1] * 2), torch.tensor([0] * 3 + [1] * 5 + [2] * 2)
    generator = torch.Generator().manual_seed(9)

    def ids(vocabulary: int, sequence: Tensor):
        return (*(torch.randint(0, vocabulary, (len(sequence),), generator=generator) for _ in range(2)), sequence)

    return {
        "attention": CrossModelAttention(D, E).double(),
        "student_ids": ids(V, student_sequence_T),
        "teacher_ids": ids(W, teacher_sequence_U),
        "hidden": (normal(6, D).requires_grad_(), normal(10, E, seed=3)),
        "embeddings": (normal(V, D, seed=4), normal(W, E, seed=5)),
        "value_U": torch.randint(0, W, (10,), generator=generator),
    }


def attend(attention, student_ids, teacher_ids, hidden, embeddings, value_U):
    found = scales(hidden[1], teacher_ids[0], teacher_ids[1], value_U, embeddings[1])
    scores = attention.scores(student_ids, teacher_ids, *embeddings, found.key, num_sequences=3)
    return scores, found, attention(*hidden, scores, value_U, embeddings[1], found)


def test_attention_scores_are_the_formula_of_the_paper(attended):
    scores, found, _ = attend(**attended)
    (s_in, s_next, _), (t_in, t_next, _) = attended["student_ids"], attended["teacher_ids"]
    E_s, E_t = attended["embeddings"]
    key_scale = reference.deviation(torch.cat([E_t[t_in], E_t[t_next]], dim=-1))
    torch.testing.assert_close(found.key, key_scale)
    for score, rows, columns in zip(scores, [slice(0, 4), slice(4, 6)], [slice(0, 3), slice(3, 8)], strict=False):
        expected = reference.attention(
            E_s, E_t / key_scale, s_in[rows], s_next[rows], t_in[columns], t_next[columns], attended["attention"].query
        )
        torch.testing.assert_close(score, expected)


def test_attended_states_mix_the_values_of_the_same_sequence(attended):
    scores, found, (to_student_TD, to_teacher_UE) = attend(**attended)
    attention, (h_s, h_t), E_t = attended["attention"], attended["hidden"], attended["embeddings"][1]
    torch.testing.assert_close(found.hidden, reference.deviation(h_t))
    torch.testing.assert_close(found.value, reference.deviation(E_t[attended["value_U"]]))
    for i in range(6):
        sequence, columns = (0, range(3)) if i < 4 else (1, range(3, 8))
        weight = scores[sequence][i if i < 4 else i - 4].softmax(-1)
        values = [attention.t2s(h_t[j] / found.hidden + E_t[attended["value_U"][j]] / found.value) for j in columns]
        expected = sum(w * value for w, value in zip(weight, values, strict=True))
        torch.testing.assert_close(to_student_TD[i], expected)
    for j in range(8):
        sequence, rows = (0, range(4)) if j < 3 else (1, range(4, 6))
        weight = scores[sequence][:, j if j < 3 else j - 3].softmax(-1)
        expected = sum(w * attention.s2t(h_s[i]) for w, i in zip(weight, rows, strict=True))
        torch.testing.assert_close(to_teacher_UE[j], expected)


def test_a_sequence_without_a_counterpart_attends_to_nothing(attended):
    *_, (_, to_teacher_UE) = attend(**attended)
    assert torch.equal(to_teacher_UE[8:], torch.zeros(2, E, dtype=torch.float64))
    to_teacher_UE.sum().backward()
    assert torch.isfinite(attended["hidden"][0].grad).all()


def test_the_query_learns_from_both_directions_and_the_embeddings_from_none(attended):
    for embedding in attended["embeddings"]:
        embedding.requires_grad_()
    *_, (to_student_TD, to_teacher_UE) = attend(**attended)
    query = attended["attention"].query.weight
    for attended_rows in (to_student_TD, to_teacher_UE):
        assert torch.autograd.grad(attended_rows.square().sum(), query, retain_graph=True)[0].abs().sum() > 0
    (to_student_TD.sum() + to_teacher_UE.sum()).backward()
    assert all(embedding.grad is None for embedding in attended["embeddings"])
    assert attended["hidden"][1].grad is None


def test_the_second_version_has_no_biases():
    assert not [name for name, _ in CrossModelAttention(D, E, bias=False).named_parameters() if "bias" in name]
    assert {name for name, _ in CrossModelAttention(D, E).named_parameters() if "bias" in name} == {
        "query.bias",
        "t2s.bias",
        "s2t.bias",
    }


def test_scales_of_padded_grids_include_the_placeholders():
    hidden_BLE, embedding_WE = normal(2, 3, E), normal(W, E, seed=1)
    ids_BL = torch.tensor([[4, 7, 0], [9, 0, 0]])
    padded = scales(hidden_BLE, ids_BL, ids_BL, ids_BL, embedding_WE)
    torch.testing.assert_close(padded.value, reference.deviation(embedding_WE[ids_BL.flatten()]))
    assert not torch.isclose(
        padded.value, scales(*[x[ids_BL > 0] for x in [hidden_BLE] + [ids_BL] * 3], embedding_WE).value
    )
