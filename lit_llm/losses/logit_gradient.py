"""Per-token losses together with their gradient with respect to the logits, in closed form.

With q = softmax(z / temperature) and u = dD/dq, the gradient of a divergence D is dD/dz = q (u - <q, u>) / temperature;
cross-entropy gives softmax(z) - onehot. Nothing is kept for a backward pass and buffers are used up in place, so a chunk
of logits costs a third of the memory of automatic differentiation. The values are those of `Divergence`, which remains
the readable definition; what it does with infinite logits, and its two losses without a closed form here, go through
automatic differentiation.

Shapes: C rows of a chunk, N of them compared with a teacher (the first ones), V vocabulary, S <= V columns that the
teacher shares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.divergence import (
    Divergence,
    adaptive_weights,
    all_finite,
    log_mixture,
    log_softmax,
)
from lit_llm.losses.scratch import best_tokens, scratch

_BY_AUTOGRAD = ("hierarchical_ranking",)
_compiled = False


def compile_elementwise(on: bool) -> None:
    """Compile the elementwise parts with torch.compile in this process from now on, or not; the numbers stay the same.

    It takes half a minute at the first step and saves about a third of their time, so it is for long runs.
    """
    global _compiled
    _compiled = on


def is_compiled() -> bool:
    """Whether the elementwise parts are compiled."""
    return _compiled


@functools.cache
def compiled(function: Callable) -> Callable:
    """The compiled form of a function of tensors."""
    return torch.compile(function, fullgraph=True)


class Formed(NamedTuple):
    """A weighted sum of losses whose gradient at the logits is already formed.

    Attributes:
        value: the weighted sum, detached.
        at: (logits as the head returned them, gradient there) of every head that was used.
    """

    value: Tensor
    at: tuple[tuple[Tensor, Tensor], ...] = ()

    def backward(self, inputs: list[Tensor]) -> None:
        """Carry the gradients from the logits on to `inputs`."""
        pairs = [(logits, gradient) for logits, gradient in self.at if logits.requires_grad]
        if pairs:
            torch.autograd.backward([z for z, _ in pairs], [g.to(z.dtype) for z, g in pairs], inputs=inputs)


class TokenTerms(NamedTuple):
    """Cross-entropy and divergence of the rows of one chunk.

    Attributes:
        formed: their weighted sum.
        ce: sum of the cross-entropy, unweighted; 0 without targets.
        kd: sum of the divergence, unweighted; 0 without a teacher.
        best_C: the most probable token of each row.
    """

    formed: Formed
    ce: Tensor
    kd: Tensor
    best_C: Tensor


@torch.no_grad()
def token_terms(
    logits_CV: Tensor,
    *,
    target_C: Tensor | None = None,
    ce_weight: float | Tensor = 1.0,
    counted_C: Tensor | None = None,
    teacher_NS: Tensor | None = None,
    divergence: Divergence | None = None,
    kd_weight: float | Tensor = 1.0,
    consume: bool = False,
) -> TokenTerms:
    """Weighted cross-entropy and divergence of one chunk, and the gradient of both at the logits.

    Args:
        logits_CV: the trained side, of any dtype; computed in at least float32. Entries that are not finite count as 0.
            The gradient is formed only where they require one.
        target_C: token ids for the cross-entropy; None: none.
        ce_weight: of the cross-entropy sum.
        counted_C: rows that count, bool; None: all. Left-out rows give no value and no gradient.
        teacher_NS: logits of the teacher for the first N rows and S columns; None: no divergence.
        divergence: compares with the teacher.
        kd_weight: of the divergence sum.
        consume: both logits may be overwritten, and the gradient is used before the next call, which overwrites it. Saves
            memory and its first touch.
    """
    wanted = logits_CV.requires_grad
    original_CV, logits_CV = logits_CV, _owned(logits_CV.detach(), consume, "student, wide")
    finite_CV = None if all_finite(logits_CV) else torch.isfinite(logits_CV)
    if finite_CV is not None:
        logits_CV = logits_CV.masked_fill_(~finite_CV, 0.0)
    best_C, zero = best_tokens(logits_CV), logits_CV.new_zeros(())
    ce, kd, gradient_CV = zero, zero, None
    with_teacher = teacher_NS is not None and len(teacher_NS) > 0
    if target_C is not None:
        spare_CV = _copied(logits_CV, "cross-entropy") if with_teacher else logits_CV
        ce_C, gradient_CV = cross_entropy_gradient_(spare_CV, target_C, wanted and _counts(ce_weight))
        ce, gradient_CV = _counted(ce_C, gradient_CV, counted_C, ce_weight)
    if with_teacher:
        rows, columns = teacher_NS.shape
        teacher_NS = _owned(teacher_NS, consume, "teacher, wide")
        kd_N, kd_gradient_NS = divergence_gradient_(divergence, logits_CV[:rows, :columns], teacher_NS, wanted)
        counted_N = None if counted_C is None else counted_C[:rows]
        kd, kd_gradient_NS = _counted(kd_N, kd_gradient_NS, counted_N, kd_weight)
        gradient_CV = _added(gradient_CV, kd_gradient_NS, logits_CV.shape)
    value = ce_weight * ce + kd_weight * kd
    if gradient_CV is None:
        return TokenTerms(Formed(value), ce, kd, best_C)
    if finite_CV is not None:
        gradient_CV.masked_fill_(~finite_CV, 0.0)
    gradient_CV = gradient_CV if consume else gradient_CV.clone()
    return TokenTerms(Formed(value, ((original_CV, gradient_CV),)), ce, kd, best_C)


def cross_entropy_gradient_(logits_CV: Tensor, target_C: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """-log softmax(z)[target] of each row, (C,), and softmax(z) - onehot(target), (C, V), in the logits' place."""
    if wanted and is_compiled():
        ce_C, gradient_CV = compiled(_cross_entropy_and_softmax)(_any_rows(logits_CV), target_C)
        return ce_C, gradient_CV.scatter_add_(1, target_C[:, None], gradient_CV.new_full((len(target_C), 1), -1.0))
    log_q_CV = log_softmax_(logits_CV)
    ce_C = -log_q_CV.gather(-1, target_C[:, None]).squeeze(-1)
    if not wanted:
        return ce_C, None
    gradient_CV = log_q_CV.exp_()
    return ce_C, gradient_CV.scatter_add_(1, target_C[:, None], gradient_CV.new_full((len(target_C), 1), -1.0))


def divergence_gradient_(
    divergence: Divergence, student_CV: Tensor, teacher_CV: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row, (C,), and its gradient with respect to the student's logits, (C, V).

    Args:
        divergence: which, at which temperatures.
        student_CV: finite logits in at least float32; overwritten.
        teacher_CV: logits of the teacher, likewise.
        wanted: whether the gradient is.
    """
    if not wanted:
        return divergence(student_CV, teacher_CV), None
    if divergence.name in _BY_AUTOGRAD or divergence.epsilon or not all_finite(teacher_CV):
        return _by_autograd(divergence, student_CV, teacher_CV)
    temperatures = divergence.temperature, divergence.temperature * divergence.teacher_temperature
    if is_compiled():
        value_C, gradient_CV = compiled(_divergence_of_logits)(
            divergence, _any_rows(student_CV), _any_rows(teacher_CV), *temperatures
        )
    else:
        log_q_CV = log_softmax_(student_CV, temperatures[0])
        log_p_CV = log_softmax_(teacher_CV, temperatures[1])
        value_C, gradient_CV = _closed_form(divergence, log_q_CV, log_p_CV)
    if divergence.scale_by_temperature_squared:
        return value_C * divergence.temperature**2, gradient_CV.mul_(divergence.temperature)
    return value_C, gradient_CV if divergence.temperature == 1.0 else gradient_CV.div_(divergence.temperature)


def log_softmax_(logits_CV: Tensor, temperature: float = 1.0) -> Tensor:
    """Tempered log-probabilities in the logits' place."""
    if temperature != 1.0:
        logits_CV.div_(temperature)
    # every element is read before it is written; on other devices a second buffer costs nothing
    in_place = logits_CV.device.type == "cpu"
    return torch.log_softmax(logits_CV, -1, out=logits_CV) if in_place else logits_CV.log_softmax(-1)


def softmax_(logits_CV: Tensor) -> Tensor:
    """Probabilities in the logits' place."""
    in_place = logits_CV.device.type == "cpu"
    return torch.softmax(logits_CV, -1, out=logits_CV) if in_place else logits_CV.softmax(-1)


def _cross_entropy_and_softmax(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    log_q_CV = logits_CV.log_softmax(-1)
    return -log_q_CV.gather(-1, target_C[:, None]).squeeze(-1), log_q_CV.exp()


def _divergence_of_logits(
    divergence: Divergence, student_CV: Tensor, teacher_CV: Tensor, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    log_q_CV, log_p_CV = log_softmax(student_CV, temperature), log_softmax(teacher_CV, teacher_temperature)
    return _closed_form(divergence, log_q_CV, log_p_CV)


def _closed_form(divergence: Divergence, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Value (C,) and gradient with respect to z / temperature (C, V); uses up both arguments."""
    match divergence.name:
        case "forward_kl":
            return _forward_kl(log_q_CV, log_p_CV)
        case "reverse_kl":
            return _mixed_kl(log_q_CV, log_p_CV, 0.0, 1.0)
        case "symmetric_kl":
            return _mixed_kl(log_q_CV, log_p_CV, 0.5, 0.5)
        case "adaptive_kl":
            forward_C, reverse_C = adaptive_weights(log_q_CV, log_p_CV, divergence.alpha)
            return _mixed_kl(log_q_CV, log_p_CV, forward_C[:, None], reverse_C[:, None])
        case "js":
            return _generalized_js(log_q_CV, log_p_CV, 0.5)
        case "generalized_js":
            return _generalized_js(log_q_CV, log_p_CV, divergence.beta)
        case "skewed_forward_kl":
            return _skewed_forward_kl(log_q_CV, log_p_CV, divergence.skew)
        case "skewed_reverse_kl":
            return _skewed_reverse_kl(log_q_CV, log_p_CV, divergence.skew)
        case "tvd":
            return _tvd(log_q_CV, log_p_CV)
        case "top1_ce":
            return _top1_cross_entropy(log_q_CV, log_p_CV)
    raise ValueError(f"{divergence.name} has no closed form.")


def _forward_kl(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    gap_CV = _difference(log_p_CV, log_q_CV)
    p_CV = log_p_CV.exp_()
    return _dot(p_CV, gap_CV), log_q_CV.exp_().sub_(p_CV)


def _mixed_kl(log_q_CV: Tensor, log_p_CV: Tensor, forward, reverse) -> tuple[Tensor, Tensor]:
    """forward KL(p || q) + reverse KL(q || p) with fixed weights, numbers or (C, 1)."""
    gap_CV = _difference(log_q_CV, log_p_CV)
    q_CV, reverse_C = log_q_CV.exp_(), None
    reverse_C = _dot(q_CV, gap_CV)
    if isinstance(forward, float) and forward == 0.0:
        return reverse_C, gap_CV.sub_(reverse_C[:, None]).mul_(q_CV)
    p_CV = log_p_CV.exp_()
    forward_C = -_dot(p_CV, gap_CV)
    gradient_CV = gap_CV.sub_(reverse_C[:, None]).mul_(q_CV).mul_(reverse)
    value_C1 = forward * forward_C[:, None] + reverse * reverse_C[:, None]
    return value_C1.squeeze(1), gradient_CV.add_(q_CV.sub_(p_CV).mul_(forward))


def _generalized_js(log_q_CV: Tensor, log_p_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_CV = log_mixture(log_q_CV, log_p_CV, beta)
    student_CV, teacher_CV = log_q_CV - log_m_CV, log_m_CV.sub_(log_p_CV).neg_()
    q_CV = log_q_CV.exp_()
    student_C, teacher_C = _dot(q_CV, student_CV), _dot(log_p_CV.exp_(), teacher_CV)
    return beta * student_C + (1 - beta) * teacher_C, student_CV.sub_(student_C[:, None]).mul_(q_CV).mul_(beta)


def _skewed_forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_m_CV = log_mixture(log_p_CV, log_q_CV, skew)
    gap_CV = log_p_CV - log_m_CV
    value_C = _dot(log_p_CV.exp(), gap_CV)
    # q u = -(1 - skew) p q / m
    qu_CV = gap_CV.add_(log_q_CV).exp_().mul_(skew - 1)
    return value_C, qu_CV.sub_(log_q_CV.exp_().mul_(qu_CV.sum(-1, keepdim=True)))


def _skewed_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_m_CV = log_mixture(log_q_CV, log_p_CV, skew)
    gap_CV = log_q_CV - log_m_CV
    q_CV = log_q_CV.exp_()
    value_C = _dot(q_CV, gap_CV)
    u_CV = gap_CV.sub_(gap_CV.exp().mul_(skew))
    return value_C, u_CV.sub_(_dot(q_CV, u_CV)[:, None]).mul_(q_CV)


def _tvd(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    q_CV = log_q_CV.exp_()
    gap_CV = q_CV - log_p_CV.exp_()
    value_C = 0.5 * torch.linalg.vector_norm(gap_CV, ord=1, dim=-1)
    u_CV = gap_CV.sign_().mul_(0.5)
    return value_C, u_CV.sub_(_dot(q_CV, u_CV)[:, None]).mul_(q_CV)


def _top1_cross_entropy(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    log_p_C1, best_C1 = log_p_CV.max(-1, keepdim=True)
    p_C1 = log_p_C1.exp()
    value_C1 = -(p_C1 * log_q_CV.gather(-1, best_C1))
    return value_C1.squeeze(1), log_q_CV.exp_().mul_(p_C1).scatter_add_(1, best_C1, -p_C1)


def _by_autograd(divergence: Divergence, student_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        student_CV = student_CV.detach().requires_grad_()
        value_C = divergence(student_CV, teacher_CV)
        (gradient_CV,) = torch.autograd.grad(value_C.sum(), student_CV)
    return value_C.detach(), gradient_CV


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return (left_CV * right_CV).sum(-1)
    # a batched product: torch.linalg.vecdot forms the elementwise product first
    return torch.bmm(left_CV[:, None], right_CV[:, :, None]).view(-1)


def _any_rows(logits_CV: Tensor) -> Tensor:
    # one compiled form for chunks of every size, the last and shorter one included
    if logits_CV.shape[0] > 1:
        torch._dynamo.mark_dynamic(logits_CV, 0)
    return logits_CV


def _owned(logits: Tensor, consume: bool, name: str) -> Tensor:
    """The logits in at least float32, as a tensor that may be overwritten."""
    wide_enough = logits.dtype in (torch.float32, torch.float64)
    return logits if wide_enough and consume else _copied(logits, name)


def _copied(logits: Tensor, name: str) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return scratch(name, logits, dtype=dtype).copy_(logits)


def _difference(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return left_CV - right_CV
    return torch.sub(left_CV, right_CV, out=scratch("difference", left_CV))


def _counts(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _counted(
    value_C: Tensor, gradient_CV: Tensor | None, counted_C: Tensor | None, weight: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """The sum over the rows that count, and their weighted gradient."""
    if counted_C is not None:
        value_C, weight = value_C.masked_fill(~counted_C, 0.0), weight * counted_C[:, None]
    if gradient_CV is not None and not (isinstance(weight, float) and weight == 1.0):
        gradient_CV.mul_(weight)
    return value_C.sum(), gradient_CV


def _added(gradient_CV: Tensor | None, part_NS: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The sum of two gradients, of which the second covers the first N rows and S columns."""
    if part_NS is None:
        return gradient_CV
    if gradient_CV is None:
        if part_NS.shape == shape:
            return part_NS
        gradient_CV = part_NS.new_zeros(shape)
    gradient_CV[: part_NS.shape[0], : part_NS.shape[1]].add_(part_NS)
    return gradient_CV
