"""What separates DSKD v1 from v2: the presets and the switches between them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Optional


@dataclass
class Projectors:
    """The linear maps between the two representation spaces, and how the two spaces are compared.

    Every field that is left out takes the value of the preset `version`.

    Args:
        version: `v1` (arXiv 2406.17328) or `v2` (arXiv 2504.11426), the values of the fields below.
        start: teacher-to-student map in closed form from the two heads (`ideal`, v2) or `random` (v1).
        student_to_teacher: `closed_form` from the current heads, without parameters (v2), or `trained` (v1).
        bias: projectors with a bias (v1).
        lr: learning rate of the projectors (v1 1e-3, v2 5e-4).
        gradient_clip: clip the projectors' gradient norm by itself, before the joint clip; None: only jointly.
        teacher_target: what the projected teacher is trained to predict: the `gold` token (v1) or the `teacher`'s own
            prediction (v2).
        student_mask: tokens that count in the student's space: `none` left out (v1), `correct` projected predictions
            (v1 across tokenizers), or those that `agree` with the teacher (v2).
        teacher_space: the divergence in the teacher's space: always `forward_kl` (v1) or the `same` as in the
            student's (v2).
        across_tokenizers: exact token alignment `eta` (v2) or learned cross-model attention `cma` (v1).
        masked_mean: a masked term is a mean over the `agreeing` tokens of a micro-batch, as published, or over all
            `labelled` ones of the optimizer step, which does not depend on how a batch is split.
        agreement_threshold: above this share of agreeing tokens nothing is masked; 1 masks always.
        token_map: which tokens two vocabularies share: by `bytes`, or by `string` as released.
        topk_vocab: tokens used for the closed form, by student id; -1: all.
        rcond: relative cut-off of singular values; None: max(rows, width) * 1.19e-7, as released.
        center_heads: subtract the columns' means first; better in distribution, not in the papers.
        spaces: `both`, or only the terms of the `student` or the `teacher` space.
    """

    version: Literal["v1", "v2"] = "v2"
    start: Optional[Literal["ideal", "random"]] = None
    student_to_teacher: Optional[Literal["closed_form", "trained"]] = None
    bias: Optional[bool] = None
    lr: Optional[float] = None
    gradient_clip: Optional[float] = None
    teacher_target: Optional[Literal["gold", "teacher"]] = None
    student_mask: Optional[Literal["none", "correct", "agree"]] = None
    teacher_space: Optional[Literal["forward_kl", "same"]] = None
    across_tokenizers: Optional[Literal["eta", "cma"]] = None
    masked_mean: Literal["agreeing", "labelled"] = "agreeing"
    agreement_threshold: float = 1.0
    token_map: Literal["bytes", "string"] = "bytes"
    topk_vocab: int = -1
    rcond: Optional[float] = None
    center_heads: bool = False
    spaces: Literal["both", "student", "teacher"] = "both"

    def resolved(self, same_tokenizer: bool) -> Projectors:
        """The settings with every open field filled from the preset.

        Raises:
            ValueError: combinations that cannot take effect, with both keys.
        """
        preset = dict(_PRESETS[self.version])
        if self.version == "v1" and not same_tokenizer:
            preset["student_mask"] = "correct"
        filled = {f.name: preset[f.name] for f in fields(self) if getattr(self, f.name) is None and f.name in preset}
        settings = replace(self, **filled)
        settings._check(same_tokenizer)
        return settings

    def _check(self, same_tokenizer: bool) -> None:
        if not 0 <= self.agreement_threshold <= 1:
            raise ValueError(f"projectors.agreement_threshold is {self.agreement_threshold}; it is a share, 0 to 1.")
        if self.student_mask == "none" and self.agreement_threshold != 1:
            raise ValueError(
                f"projectors.agreement_threshold is {self.agreement_threshold}, but projectors.student_mask is 'none', "
                "so nothing is masked. Set student_mask: agree, or leave the threshold at 1."
            )
        if self.start == "ideal" and self.bias:
            raise ValueError(
                "projectors.start is 'ideal', whose closed form has no bias, but projectors.bias is true. "
                "Set bias: false or start: random."
            )
        if same_tokenizer:
            return
        if self.across_tokenizers == "cma" and self.student_to_teacher == "closed_form":
            raise ValueError(
                "projectors.across_tokenizers is 'cma', which learns its maps, but projectors.student_to_teacher is "
                "'closed_form'. Set student_to_teacher: trained, or across_tokenizers: eta."
            )
        if self.across_tokenizers == "eta" and self.teacher_target == "gold":
            raise ValueError(
                "projectors.across_tokenizers is 'eta', whose labels are the teacher's predictions, but "
                "projectors.teacher_target is 'gold'. Set teacher_target: teacher, or across_tokenizers: cma."
            )


_PRESETS = {
    "v1": {
        "start": "random",
        "student_to_teacher": "trained",
        "bias": True,
        "lr": 1e-3,
        "teacher_target": "gold",
        "student_mask": "none",
        "teacher_space": "forward_kl",
        "across_tokenizers": "cma",
    },
    "v2": {
        "start": "ideal",
        "student_to_teacher": "closed_form",
        "bias": False,
        "lr": 5e-4,
        "teacher_target": "teacher",
        "student_mask": "agree",
        "teacher_space": "same",
        "across_tokenizers": "eta",
    },
}
