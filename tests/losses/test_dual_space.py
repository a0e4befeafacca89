"""The dual-space loss against the papers' formulas, token by token in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.dual_space import DualSpace, dual_space, dual_space_cma
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import distillation as reference

T, U, D, E, V, W = 14, 11, 5, 7, 9, 12
PAIRS = [(0, 1), (2, 2), (3, 4), (6, 5), (7, 6), (9, 8), (11, 9), (13, 10)]
STUDENT_OF_TEACHER = [2, -1, 0, 1, 5, -1, 3, 4, 8, 7, 6, -1]


class Setting:
    """Random models; `of_pairs` gives the arguments of `dual_space` for two tokenizers, `of_rows` for one."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.student_TD, self.student_VD = normal(T, D).requires_grad_(), normal(V, D).requires_grad_()
        self.teacher_UE, self.teacher_WE = normal(max(T, U), E), normal(W, E)
        self.P, self.S = normal(D, E).requires_grad_(), normal(E, D).requires_grad_()
        self.target_T = torch.randint(0, V, (T,), generator=generator)
        self.trained = [self.student_TD, self.student_VD, self.P, self.S]

    def projectors(self) -> dict:
        return {"P": lambda h: self.P @ h, "S": lambda h: self.S @ h}

    def loss(self, settings: DualSpace, pairs=None, **options):
        student_A, teacher_A = torch.tensor(pairs or [(i, i) for i in range(T)], dtype=torch.int64).T
        teacher_AE = self.teacher_UE[teacher_A]
        return dual_space(
            self.student_TD,
            self.target_T,
            Head(self.student_VD),
            teacher_AE,
            Head(self.teacher_WE),
            teacher_AE @ self.P.T,
            self.student_TD[student_A] @ self.S.T,
            settings,
            pair_student_A=student_A if pairs else None,
            **options,
        )

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.trained, allow_unused=True))

    def models(self) -> tuple:
        return self.student_TD, self.student_VD, self.target_T, self.teacher_UE, self.teacher_WE


def assert_same(setting: Setting, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(setting.gradients(found), setting.gradients(expected), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_version_one_is_the_formula_of_the_paper(chunk_size):
    setting, skewed = Setting(), {"name": "skewed_forward_kl", "temperature": 2.0, "skew": 0.2}
    settings = DualSpace(Divergence(**skewed), Divergence(), teacher_target="gold", student_mask="none")
    terms = setting.loss(settings, ce_weight=0.6 / 9, kd_weight=0.4, kd_denominator=9.0, chunk_size=chunk_size)
    expected = reference.dskd_v1(*setting.models(), **setting.projectors(), rate=0.4, tokens=9.0, **skewed)
    assert_same(setting, terms.loss, expected)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
@pytest.mark.parametrize("masked_mean", ["agreeing", "labelled"])
@pytest.mark.parametrize(
    ("mask", "threshold"), [("agree", 1.0), ("agree", 0.0), ("agree", 0.25), ("correct", 1.0), ("none", 1.0)]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_version_two_is_the_formula_of_the_paper(mask, threshold, masked_mean, chunk_size, seed):
    setting = Setting(seed)
    settings = DualSpace(
        Divergence(name="reverse_kl", temperature=1.0),
        Divergence(name="reverse_kl", temperature=1.0),
        student_mask=mask,
        masked_mean=masked_mean,
        agreement_threshold=threshold,
    )
    terms = setting.loss(settings, ce_weight=0.6 / 9, kd_weight=0.4, kd_denominator=9.0, chunk_size=chunk_size)
    expected = reference.dskd_v2(
        *setting.models(),
        **setting.projectors(),
        rate=0.4,
        tokens=9.0,
        kd_tokens=9.0,
        mask=mask,
        masked_mean=masked_mean,
        threshold=threshold,
        name="reverse_kl",
        temperature=1.0,
    )
    assert_same(setting, terms.loss, expected)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl"])
@pytest.mark.parametrize("kd_denominator", [None, 21.0])
def test_exact_token_alignment_is_the_formula_of_the_paper(kd_denominator, name, chunk_size):
    setting = Setting()
    settings = DualSpace(Divergence(name=name), Divergence(name=name))
    terms = setting.loss(
        settings,
        PAIRS,
        ce_weight=0.5 / 30,
        kd_weight=0.5,
        kd_denominator=kd_denominator,
        teacher_to_student_W=torch.tensor(STUDENT_OF_TEACHER),
        chunk_size=chunk_size,
    )
    expected = reference.dskd_v2(
        *setting.models(),
        **setting.projectors(),
        rate=0.5,
        tokens=30.0,
        kd_tokens=kd_denominator,
        pairs=PAIRS,
        label_of=STUDENT_OF_TEACHER,
        name=name,
        temperature=2.0,
    )
    assert 0 < terms.mapped < terms.pairs == len(PAIRS)
    assert_same(setting, terms.loss, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_cross_model_attention_is_the_formula_of_the_paper(chunk_size):
    setting = Setting()
    mix = torch.randn(T, U, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(-1)
    teacher_UE = setting.teacher_UE[:U]
    attended_TD = mix @ (teacher_UE @ setting.P.T) * 2
    attended_UE = mix.T @ (setting.student_TD @ setting.S.T)
    setting.target_T[::2] = (attended_TD @ setting.student_VD.T).argmax(-1)[::2]
    hotter = {"name": "forward_kl", "temperature": 2.0, "teacher_temperature": 1.5}
    settings = DualSpace(Divergence(**hotter), Divergence(), student_mask="correct", masked_mean="labelled")
    terms = dual_space_cma(
        setting.student_TD,
        setting.target_T,
        Head(setting.student_VD),
        attended_TD,
        teacher_UE,
        Head(setting.teacher_WE),
        attended_UE,
        settings,
        ce_weight=0.5 / 20,
        kd_weight=0.5,
        kd_denominator=20.0,
        chunk_size=chunk_size,
    )
    expected = reference.dskd_cma(
        setting.student_TD,
        setting.student_VD,
        setting.target_T,
        attended_TD,
        teacher_UE,
        setting.teacher_WE,
        attended_UE,
        rate=0.5,
        tokens=20.0,
        teacher_space="forward_kl",
        **hotter,
    )
    assert T // 2 <= terms.masked < T
    torch.testing.assert_close(terms.loss, expected)
    found, wanted = (torch.autograd.grad(loss, setting.trained, retain_graph=True) for loss in (terms.loss, expected))
    torch.testing.assert_close(found, wanted)


def only(term: str) -> tuple[DualSpace, dict]:
    """Settings under which one term of the loss is left (or two, where they cannot be told apart by a switch)."""
    settings = DualSpace(student_mask="none", spaces="teacher" if term == "s2t_kd" else "student")
    return settings, {"ce_weight": float(term == "ce"), "kd_weight": float(term != "ce"), "kd_denominator": 1.0}


def test_cross_entropy_trains_the_student_only():
    setting = Setting()
    settings, options = only("ce")
    body, head, P, S = setting.gradients(setting.loss(settings, **options).loss)
    assert body.abs().sum() > 0
    assert head.abs().sum() > 0
    assert P.abs().sum() == 0
    assert S.abs().sum() == 0


def test_the_student_space_trains_the_projector_through_its_cross_entropy_only():
    setting = Setting()
    settings, options = only("t2s")
    body, head, P, S = setting.gradients(setting.loss(settings, **options).loss)
    assert S.abs().sum() == 0
    labels = (setting.teacher_UE[:T] @ setting.teacher_WE.T).argmax(-1).clamp(max=V - 1)
    keep = (setting.teacher_UE[:T] @ setting.teacher_WE.T).argmax(-1) < V
    z_ts = setting.teacher_UE[:T] @ setting.P.T @ setting.student_VD.detach().T
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(z_ts[keep], labels[keep], reduction="sum"), setting.P
    )
    torch.testing.assert_close(P, expected[0])

    # body and head learn from z_s alone: the projected teacher is a constant to them
    z_s = setting.student_TD @ setting.student_VD.T
    kd = Divergence()(z_s[keep], z_ts[keep].detach()).sum()
    torch.testing.assert_close([body, head], list(torch.autograd.grad(kd, [setting.student_TD, setting.student_VD])))


def test_the_teacher_space_trains_the_student_body_and_its_projector():
    setting = Setting()
    settings, options = only("s2t_kd")
    body, head, P, S = setting.gradients(setting.loss(settings, **options).loss)
    assert body.abs().sum() > 0
    assert S.abs().sum() > 0
    assert head.abs().sum() == 0
    assert P.abs().sum() == 0


def test_the_teacher_gets_no_gradient_even_if_it_asks_for_one():
    setting = Setting()
    setting.teacher_UE.requires_grad_()
    setting.teacher_WE.requires_grad_()
    projected = (setting.teacher_UE.detach() @ setting.P.T)[:T]
    terms = dual_space(
        setting.student_TD,
        setting.target_T,
        Head(setting.student_VD),
        setting.teacher_UE[:T],
        Head(setting.teacher_WE),
        projected,
        setting.student_TD @ setting.S.T,
        DualSpace(),
        ce_weight=1.0,
        kd_weight=1.0,
        kd_denominator=1.0,
    )
    terms.loss.backward()
    assert setting.teacher_UE.grad is None
    assert setting.teacher_WE.grad is None


@pytest.mark.parametrize("mask", ["none", "agree", "correct"])
def test_two_halves_with_one_denominator_add_up_to_the_whole(mask):
    settings = DualSpace(student_mask=mask, masked_mean="labelled")
    options = {"ce_weight": 0.5 / T, "kd_weight": 0.5, "kd_denominator": float(T)}
    whole = Setting()
    expected = whole.gradients(whole.loss(settings, **options).loss)

    def of_rows(span: slice) -> Tensor:
        return dual_space(
            whole.student_TD[span],
            whole.target_T[span],
            Head(whole.student_VD),
            whole.teacher_UE[:T][span],
            Head(whole.teacher_WE),
            whole.teacher_UE[:T][span] @ whole.P.T,
            whole.student_TD[span] @ whole.S.T,
            settings,
            **options,
        ).loss

    torch.testing.assert_close(whole.gradients(of_rows(slice(0, 5)) + of_rows(slice(5, T))), expected)


def test_the_published_masked_mean_depends_on_the_split():
    settings = DualSpace(student_mask="agree", masked_mean="agreeing")
    setting = Setting(3)
    options = {"ce_weight": 0.0, "kd_weight": 1.0, "kd_denominator": float(T)}
    terms = setting.loss(settings, **options)
    labelled = setting.loss(replace(settings, masked_mean="labelled"), **options)
    assert 0 < terms.masked < T
    assert terms.t2s_kd == labelled.t2s_kd
    assert not torch.isclose(terms.loss, labelled.loss)


def test_counts_say_what_they_count():
    setting = Setting()
    table_W = torch.tensor(STUDENT_OF_TEACHER)
    terms = setting.loss(
        DualSpace(),
        PAIRS,
        ce_weight=1.0,
        kd_weight=1.0,
        kd_denominator=None,
        teacher_to_student_W=table_W,
        chunk_size=3,
    )
    student_A, teacher_A = torch.tensor(PAIRS).T
    teacher_AE, gold_A = setting.teacher_UE[teacher_A], setting.target_T[student_A]
    best_t = (teacher_AE @ setting.teacher_WE.T).argmax(-1)
    best_s = (setting.student_TD @ setting.student_VD.T).argmax(-1)
    best_ts = (teacher_AE @ setting.P.T @ setting.student_VD.T).argmax(-1)
    best_st = (setting.student_TD[student_A] @ setting.S.T @ setting.teacher_WE.T).argmax(-1)
    label_A = table_W[best_t]
    expected = {
        "tokens": T,
        "pairs": len(PAIRS),
        "mapped": (label_A >= 0).sum(),
        "masked": ((best_ts == label_A) & (label_A >= 0)).sum(),
        "correct": (best_s == setting.target_T).sum(),
        "t2s_correct": (best_ts == gold_A).sum(),
        "t2s_agree": (best_ts == label_A).sum(),
        "s2t_agree": (best_st == best_t).sum(),
        "agree": ((best_s[student_A] == label_A) & (label_A >= 0)).sum(),
    }
    assert {name: int(getattr(terms, name)) for name in expected} == {
        name: int(value) for name, value in expected.items()
    }


def test_a_prediction_without_a_counterpart_drops_the_pair_from_every_term_but_cross_entropy():
    setting = Setting()
    nothing_W = torch.full((W,), -1)
    options = {"ce_weight": 0.5, "kd_weight": 0.5, "kd_denominator": None}
    terms = setting.loss(DualSpace(), PAIRS, teacher_to_student_W=nothing_W, **options)
    assert terms.mapped == terms.t2s_ce == terms.t2s_kd == terms.s2t_kd == 0
    torch.testing.assert_close(terms.loss, 0.5 * terms.ce)
    body, _, P, S = setting.gradients(terms.loss)
    assert body.abs().sum() > 0
    assert P.abs().sum() == S.abs().sum() == 0


def test_predictions_in_padded_rows_of_the_teacher_have_no_counterpart():
    setting = Setting()
    terms = setting.loss(DualSpace(), ce_weight=1.0, kd_weight=1.0, kd_denominator=1.0)
    best_t = (setting.teacher_UE[:T] @ setting.teacher_WE.T).argmax(-1)
    assert terms.mapped == (best_t < V).sum() < T


@pytest.mark.parametrize("pairs", [[], PAIRS])
def test_no_rows_or_no_pairs_give_terms_of_zero_with_a_graph(pairs):
    setting = Setting()
    if pairs:
        setting.student_TD, setting.target_T, pairs = setting.student_TD[:0], setting.target_T[:0], []
    student_A = torch.zeros(0, dtype=torch.int64)
    terms = dual_space(
        setting.student_TD,
        setting.target_T,
        Head(setting.student_VD),
        setting.teacher_UE[:0],
        Head(setting.teacher_WE),
        setting.teacher_UE[:0] @ setting.P.T,
        setting.student_TD[student_A] @ setting.S.T,
        DualSpace(),
        ce_weight=1.0,
        kd_weight=1.0,
        kd_denominator=None,
        pair_student_A=student_A,
        teacher_to_student_W=torch.arange(W),
    )
    assert terms.t2s_ce == terms.t2s_kd == terms.s2t_kd == 0
    for gradient in torch.autograd.grad(terms.loss, [setting.P, setting.S, setting.student_VD]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("space", ["student", "teacher"])
def test_one_space_alone_leaves_the_other_out(space):
    setting = Setting()
    options = {"ce_weight": 0.5, "kd_weight": 0.5, "kd_denominator": 7.0}
    both = setting.loss(DualSpace(), **options)
    alone = setting.loss(DualSpace(spaces=space), **options)
    if space == "student":
        assert alone.s2t_kd == 0
        expected = both.loss - 0.5 * both.s2t_kd / 7
    else:
        assert alone.t2s_ce == alone.t2s_kd == 0
        expected = 0.5 * both.ce + 0.5 * both.s2t_kd / 7
    torch.testing.assert_close(alone.loss, expected)


def test_memory_grows_with_the_chunk_and_not_with_the_tokens():
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    torch.manual_seed(0)
    student_TD, student_VD = (
        torch.randn(tokens, width, requires_grad=True),
        torch.randn(vocabulary, width, requires_grad=True),
    )
    teacher_TE, teacher_WE = torch.randn(tokens, width), torch.randn(vocabulary, width)
    P, S = (torch.randn(width, width, requires_grad=True) for _ in range(2))
    target_T = torch.randint(0, vocabulary, (tokens,))
    for mask in ("none", "agree"):
        with LargestTensor() as watch:
            dual_space(
                student_TD,
                target_T,
                Head(student_VD),
                teacher_TE,
                Head(teacher_WE),
                teacher_TE @ P,
                student_TD @ S,
                DualSpace(student_mask=mask),
                ce_weight=1.0,
                kd_weight=1.0,
                kd_denominator=1.0,
                chunk_size=chunk,
            ).loss.backward()
        assert watch.elements == chunk * vocabulary


def test_without_gradients_none_are_formed():
    setting = Setting()
    with torch.no_grad():
        terms = setting.loss(DualSpace(), ce_weight=1.0, kd_weight=1.0, kd_denominator=1.0)
    assert not terms.loss.requires_grad
    with_graph = setting.loss(DualSpace(), ce_weight=1.0, kd_weight=1.0, kd_denominator=1.0)
    torch.testing.assert_close(terms.loss, with_graph.loss.detach())


def test_rows_that_are_not_paired_are_refused_with_their_numbers():
    setting = Setting()
    setting.target_T = setting.target_T[1:]
    with pytest.raises(ValueError, match=f"{T - 1} target rows, but {T} were expected"):
        setting.loss(DualSpace(), PAIRS, ce_weight=1.0, kd_weight=1.0, kd_denominator=1.0)
