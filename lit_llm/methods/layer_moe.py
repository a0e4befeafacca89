"""LayerMoE: add languages to a model by experts per layer, without forgetting the ones it knows.

Shapes: B rows, L padded positions, M = B L of them, T supervised tokens, D width, N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_llm.data.batch import LanguageBatch
from lit_llm.data.languages import Languages
from lit_llm.evaluation.routing import RoutedLayer, RoutingStatistics
from lit_llm.losses.routing import (
    PriorForm,
    RoutingLoss,
    balance_per_slot,
    classifier_loss,
    expert_slots,
    group_prior,
    language_prior,
    load_balance,
)
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Method, Optimization
from lit_llm.methods.expansion import check_groups, parameter_counts, plan_expansion, write_expansion
from lit_llm.methods.layer_moe_settings import Expand, Similarity
from lit_llm.models import allocation, surgery
from lit_llm.models.dispatch import Dispatch
from lit_llm.models.expansion_plan import ClassifierPlan, ExpansionPlan
from lit_llm.models.experts import Gate, Routing, Scope, collect_routing
from lit_llm.models.language_model import ModelSpec
from lit_llm.seeds import run_seed

_STAGE_1 = {"expand": None, "similarity": None, "balance_coef": 0.01, "balance_over": "micro_batch"}
_STAGE_2 = {
    **{"lpr_coef": 0.1, "lpr_form": "exact", "prior_groups": "original", "classifier_layers": None},
    **{
        "classifier_coef": 0.1,
        "classifier_scope": "token",
        "classifier_gate": "predicted",
        "classifier_threshold": 0.5,
    },
}


class LayerMoE(Method):
    """Experts for new languages beside the MLPs of a model (LayerMoE, arXiv 2505.22582; MoE-LPR, arXiv 2408.11396).

    Stage 1 measures how alike languages are in each layer, allocates and adds experts, and trains them and the routers on
    text of the newest group. Stage 2 takes that model and trains routers and classifiers alone, on text of all groups, so
    that original languages find their way back to expert 0. Everything else stays as it is, to the last bit. All terms
    are normalised over the whole optimizer step. `data` is `Languages`, with the same `stage`.

    The load f of the balance loss is that of a micro-batch, so in stage 1 another split of a batch gives another loss.

    Args:
        student: stage 1: a dense model, or one that was expanded for earlier groups; stage 2: the result of stage 1. Other
            commands than `fit` take an expanded one as it is.
        stage: 1, new experts and routers on new languages, or 2, routers and classifiers on all.
        expand: stage 1: how many experts each layer gets; None: the student has been expanded for the newest group.
        similarity: stage 1: how it is measured, or a file; None: with the defaults, where `expand` needs it.
        balance_coef: stage 1: alpha, of the load balance in the form of the released code (0.01).
        balance_over: stage 1: tokens whose load counts: those of the `micro_batch`, as released, or of `ranks`: of the
            micro-batches of all ranks together.
        lpr_coef: stage 2: gamma, of the language prior (0.1).
        lpr_form: stage 2: `exact`, or `released`: softmax twice, layers weighed by how rare their number of experts is.
        prior_groups: stage 2: tokens of `original` languages belong to expert 0; or those of `all` groups but the newest to
            the experts that existed after their group.
        classifier_layers: stage 2: layers with a classifier in front of their router: a list; or how many, those where new
            and old languages are most alike; None: none.
        classifier_coef: stage 2: beta, of the classifiers' loss (0.1).
        classifier_scope: stage 2: decide per `token`; or per row from the sum of its positions (`sequence_sum`, as
            released: not causal, and not for generation).
        classifier_gate: stage 2: route by what is `predicted`, or in training by the `label`.
        classifier_threshold: stage 2: of the probability of an original language above which expert 0 works alone.
        dispatch: how rows are multiplied by their experts: `grouped` products, a `loop`, or what fits (`auto`).
        routing_window: optimizer steps over which routing is counted before it is logged.
        optimization: optimizer and schedule; as released, 5e-5 without weight decay.
        generation: continuations generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    compiles_loss = False
    data_classes = (Languages,)

    def __init__(
        self,
        student: ModelSpec,
        stage: Literal[1, 2] = 1,
        expand: Optional[Expand] = None,
        similarity: Optional[Similarity] = None,
        balance_coef: float = 0.01,
        balance_over: Literal["micro_batch", "ranks"] = "micro_batch",
        lpr_coef: float = 0.1,
        lpr_form: PriorForm = "exact",
        prior_groups: Literal["original", "all"] = "original",
        classifier_layers: Optional[Union[int, list[int]]] = None,
        classifier_coef: float = 0.1,
        classifier_scope: Scope = "token",
        classifier_gate: Gate = "predicted",
        classifier_threshold: float = 0.5,
        dispatch: Dispatch = "auto",
        routing_window: int = 20,
        optimization: Optimization = Optimization(lr=5e-5, weight_decay=0.0),
        generation: Generation = Generation(prompts=0, test_prompts=0),
        loss_chunk: Optional[int] = None,
    ) -> None:
        super().__init__(student, optimization, generation, loss_chunk)
        self.stage, self.expand_settings, self.similarity = stage, expand, similarity
        self.balance_coef, self.balance_over = balance_coef, balance_over
        self.lpr_coef, self.lpr_form, self.prior_groups = lpr_coef, lpr_form, prior_groups
        self.classifier_layers, self.classifier_coef = classifier_layers, classifier_coef
        self.classifier_scope, self.classifier_gate = classifier_scope, classifier_gate
        self.classifier_threshold = classifier_threshold
        self.dispatch, self.routing_window = dispatch, routing_window
        self._check(dict(locals()))
        self.plan: ExpansionPlan | None = None
        self._window: RoutingStatistics | None = None
        self._evaluated: RoutingStatistics | None = None

    # ---------------------------------------------------------------- models

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        super().setup(stage)
        if data is not None and data.stage != self.stage:
            raise ValueError(
                f"model.stage is {self.stage}, but data.stage is {data.stage}: stage 1 trains on the newest group, stage 2 on "
                f"all. Set both to the same number."
            )

    def configure_model(self) -> None:
        """Load the student and bring it to its plan: that of the checkpoint which is continued, or for `fit` a new one."""
        if self.student is not None:
            return
        super().configure_model()
        model = self.student.transformer
        data = None if self._trainer is None else self.trainer.datamodule
        trains = data is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.plan is not None:
            surgery.expand(model, self.plan, dispatch=self.dispatch)
        elif not trains and surgery.plan_of(model) is not None:
            self.plan = surgery.plan_of(model)  # what is evaluated is the student as it was saved
        elif self.stage == 1:
            self.plan = self._expanded(model, data)
        else:
            self.plan = self._with_classifiers(model, data)
        if data is not None:
            unknown = 0 if trains else max(len(data.groups) - len(self.plan.groups), 0)
            check_groups(self.plan, data, unknown)
        for routed in surgery.routed_layers(model).values():
            routed.backend = self.dispatch
            if routed.classifier is not None:
                routed.classifier.gate = self.classifier_gate
        self.trained_names = surgery.set_trainable(model, self.stage)
        groups = data.group_of if data is not None else [0]
        self._window, self._evaluated = (self._statistics(groups) for _ in range(2))

    def use_plan_of(self, checkpoint: dict[str, Any]) -> None:
        fields = checkpoint.get("lit_llm", {}).get("plan")
        self.plan = None if fields is None else ExpansionPlan.from_dict(fields)

    def _expanded(self, model, data: Languages) -> ExpansionPlan:
        settings = self.expand_settings
        if settings is None:
            plan = surgery.plan_of(model)
            check_groups(plan, data)
            return plan
        if settings.router_init == "keep" and surgery.plan_of(model) is None:
            raise ValueError(
                "expand.router_init is 'keep', but the student is dense and has no router whose rows could be kept. Leave it out."
            )
        plan = plan_expansion(self.student, data, settings, self.similarity, self.run_folder, self.trainer.strategy)
        surgery.expand(model, plan, run_seed(settings.seed), settings.router_init, self.dispatch)
        return plan

    def _with_classifiers(self, model, data: Languages) -> ExpansionPlan:
        plan = surgery.plan_of(model)
        check_groups(plan, data)
        new_old = (plan.similarity or {}).get("new_old")
        layers = allocation.classifier_layers(self.classifier_layers, plan.expert_counts, new_old)
        if layers:
            rank_zero_info(f"Classifiers in front of the routers of the layers {', '.join(map(str, layers))}")
        if plan.classifier_layers:
            rank_zero_warn(
                f"The student has classifiers already, on the layers {', '.join(map(str, plan.classifier_layers))}. They are "
                f"thrown away: a review begins with new ones, on the layers {', '.join(map(str, layers)) or '(none)'}, as "
                f"model.classifier_layers says. To go on training it, resume its run with --ckpt_path."
            )
        rule = (self.classifier_scope, self.classifier_threshold, self.classifier_gate)
        return surgery.add_classifiers(model, layers, *rule, seed=run_seed(None))

    def _statistics(self, groups: list[int]) -> RoutingStatistics:
        counts = [self.plan.expert_counts[layer] for layer in self.plan.routed_layers]
        return RoutingStatistics(counts, self.plan.experts_per_token, groups)

    def on_fit_start(self) -> None:
        write_expansion(self.run_folder, self.student.transformer)

    # -------------------------------------------------------------- training

    def training_step(self, batch: LanguageBatch, batch_idx: int) -> Tensor:
        nll_T, records = self.routed(batch)
        self._count(self._window, batch, records)
        terms = self.terms(batch, nll_T, records)
        loss, counts = 0.0, self.step_counts(batch)
        for name, term in terms.items():
            weighted = self.coefficients[name] * term.loss * self.step_weight(batch, counts[name])
            loss = loss + weighted
            self.log_step({name: term.loss}, term.tokens)
        if "balance" in terms:
            self._log_balance(terms["balance"])
        self.log_loss(loss)
        self._log_languages(batch, nll_T.detach())
        self._log_window()
        return loss

    @property
    def coefficients(self) -> dict[str, float]:
        """The weight of each term of the objective."""
        if self.stage == 1:
            return {"lm": 1.0, "balance": self.balance_coef}
        return {"lm": 1.0, "lpr": self.lpr_coef, "classifier": self.classifier_coef}

    def routed(self, batch: LanguageBatch) -> tuple[Tensor, dict[int, Routing]]:
        """(T,) negative log-likelihoods, and what the routed layers decided, in their order."""
        with collect_routing(self.student, batch.group_BL, batch.language_BL >= 0) as records:
            hidden_TD = self.student.hidden(batch.student)
        target_T = batch.student.target_T
        nll_T = -token_log_probs(hidden_TD, self.student.head, target_T, chunk_size=self.loss_chunk)
        return nll_T, {layer: records[layer] for layer in sorted(records)}

    def terms(self, batch: LanguageBatch, nll_T: Tensor, records: dict[int, Routing]) -> dict[str, RoutingLoss]:
        """The terms of the objective as sums over tokens, from what `routed` gave.

        stage 1:  L_LM + alpha L_balance                        stage 2:  L_LM + gamma L_LPR + beta L_classifier
        """
        terms = {"lm": RoutingLoss(nll_T.sum(), torch.full((), len(nll_T), device=nll_T.device))}
        logits = [record.router_logits_MN for record in records.values()]
        real_M, group_M = (batch.language_BL >= 0).flatten(), batch.group_BL.flatten()
        if self.stage == 1:
            terms["balance"] = load_balance(logits, self.plan.experts_per_token, real_M, self._load(logits, real_M))
            return terms
        if self.prior_groups == "original":
            terms["lpr"] = language_prior(logits, group_M == 0, self.lpr_form)
        else:
            bounds = [self.plan.experts_after_group(layer) for layer in records]
            terms["lpr"] = group_prior(logits, bounds, group_M, real_M)
        if self.plan.classifier_layers:
            terms["classifier"] = self._classifier_loss(batch, records)
        return terms

    def step_counts(self, batch: LanguageBatch) -> dict[str, int]:
        """What the sum of each term is divided by: tokens of the whole optimizer step."""
        by_group = batch.step_group_tokens
        prior = by_group[0] if self.prior_groups == "original" else sum(by_group[:-1])
        every = sum(by_group)
        return {"lm": batch.step_tokens, "balance": every, "lpr": prior, "classifier": every}

    def _classifier_loss(self, batch: LanguageBatch, records: dict[int, Routing]) -> RoutingLoss:
        found = [r.classifier_logits for r in records.values() if r.classifier_logits is not None]
        group_BL, real_M = batch.group_BL, (batch.language_BL >= 0).flatten()
        if self.classifier_scope == "sequence_sum":  # a row's one decision counts for each of its tokens
            length = group_BL.shape[1]
            found = [logits_B2.repeat_interleave(length, 0, output_size=group_BL.numel()) for logits_B2 in found]
            group_BL = group_BL[:, :1].expand_as(group_BL)
        return classifier_loss(found, group_BL.flatten() == 0, real_M)

    def _load(self, logits: list[Tensor], real_M: Tensor) -> list[Tensor] | None:
        """f of each layer over the micro-batches of all ranks; None: that of our own."""
        if self.balance_over == "micro_batch" or self.trainer.world_size == 1:
            return None
        k = self.plan.experts_per_token
        slots = [expert_slots(logits_MN, k, real_M).double() for logits_MN in logits]
        summed = self.trainer.strategy.reduce(torch.cat([real_M.sum()[None].double(), *slots]), reduce_op="sum")
        return list((summed[1:] / summed[0].clamp(min=1)).split([len(slots_N) for slots_N in slots]))

    def loss_terms(self, batch: LanguageBatch) -> dict[str, Callable[[], Tensor]]:
        counts = self.step_counts(batch)

        def term(name: str) -> Callable[[], Tensor]:
            weight = self.coefficients[name] * self.step_weight(batch, counts[name])
            return lambda: self.terms(batch, *self.routed(batch))[name].loss * weight

        left_out = set() if self.plan.classifier_layers else {"classifier"}
        return {name: term(name) for name, value in self.coefficients.items() if value and name not in left_out}

    # --------------------------------------------------------------- routing

    def _count(self, into: RoutingStatistics, batch: LanguageBatch, records: dict[int, Routing]) -> None:
        rows, length = batch.language_BL.shape
        layers = []
        for layer, record in records.items():
            logits, rule = record.classifier_logits, self.plan.layers[layer].classifier or ClassifierPlan()
            if logits is not None and rule.scope == "sequence_sum":
                logits = logits.repeat_interleave(length, 0, output_size=rows * length)
            layers.append(RoutedLayer(record.router_logits_MN, logits, record.bypass_M, rule.threshold))
        into.update(layers, batch.language_BL.flatten(), (batch.language_BL >= 0).flatten())

    def _log_window(self) -> None:
        """Routing since the last time, once in a window of optimizer steps; read from the device only then."""
        accumulate, done = self.trainer.accumulate_grad_batches, self.trainer.fit_loop.epoch_loop.batch_idx + 1
        if done % accumulate == 0 and (self.global_step + 1) % self.routing_window == 0:
            for name, value in self._window.compute().scalars().items():
                self.log(f"train/routing/{name}", value, batch_size=1)
            self._window.reset()

    def _log_balance(self, balance: RoutingLoss) -> None:
        """The balance as the paper has it; the term of the objective grows with k and with layers that have no choice."""
        counts = [self.plan.expert_counts[layer] for layer in self.plan.routed_layers]
        per_slot = balance_per_slot(balance, counts, self.plan.experts_per_token)
        if per_slot is not None:
            self.log_step({"balance_per_slot": per_slot.loss}, per_slot.tokens)

    def _log_languages(self, batch: LanguageBatch, nll_T: Tensor) -> None:
        """The loss of old and of new languages apart, where a stage trains on both."""
        if self.stage == 2:
            old_T = ~self._window.is_new_A[batch.language_T]
            for name, kept_T in (("lm_old", old_T), ("lm_new", ~old_T)):
                self.log_step({name: torch.where(kept_T, nll_T, 0.0).sum()}, kept_T.sum())

    # ------------------------------------------------------------ evaluation

    def evaluation_hidden(self, batch: LanguageBatch) -> Tensor:
        with collect_routing(self.student, batch.group_BL, batch.language_BL >= 0) as records:
            hidden_TD = self.student.hidden(batch.student)
        self._count(self._evaluated, batch, {layer: records[layer] for layer in sorted(records)})
        return hidden_TD

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._finish_routing("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._finish_routing("test")

    def _finish_routing(self, stage: str) -> None:
        found = self._evaluated.compute()
        self._evaluated.reset()
        if self.trainer.sanity_checking or self.language_report is None:
            return
        for name, value in found.scalars().items():
            self.log(f"{stage}/routing/{name}", value, batch_size=1)
        self.language_report["routing"] = {
            "layers": self.plan.routed_layers,
            "experts": found.experts,
            "by_layer": found.layers,
            "by_language": found.languages,
            "load_shares": found.load_shares,
            "parameters": parameter_counts(self.student.transformer),
        }

    @property
    def evaluation_words(self) -> str:
        return f"stage {self.stage} ({self.trainer.datamodule.group_names[-1]})"

    # ---------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_llm"]["plan"] = self.plan.to_dict()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "stage": self.stage}

    # -------------------------------------------------------------- settings

    def _check(self, given: dict[str, Any]) -> None:
        for name, default in (_STAGE_2 if self.stage == 1 else _STAGE_1).items():
            if given[name] != default:
                raise ValueError(
                    f"model.{name} is set, but model.stage is {self.stage}, which does not use it. Leave it out, or set "
                    f"model.stage: {3 - self.stage}."
                )
        if self.student_spec.lora is not None:
            raise ValueError(
                "model.student.lora is set, but LayerMoE trains experts, routers and classifiers, and adapters would stay as they "
                "begin. Leave lora out; for a model with adapters name its folder as model.student.source, and they are merged."
            )
        for name in ("balance_coef", "lpr_coef", "classifier_coef"):
            if given[name] < 0:
                raise ValueError(f"model.{name} is {given[name]}; it must be at least 0.")
        if self.routing_window < 1:
            raise ValueError(f"model.routing_window is {self.routing_window}; it counts optimizer steps, at least 1.")
        if self.similarity is not None and self.expand_settings is None:
            raise ValueError(
                "model.similarity is set, but model.expand is not, so nothing would use it. Set model.expand."
            )
        if self.lpr_form == "released" and self.prior_groups == "all":
            raise ValueError(
                "model.lpr_form is 'released', but model.prior_groups is 'all', which the released code has not. Keep one."
            )
        answers = self.generation.prompts or self.generation.test_prompts
        if self.classifier_scope == "sequence_sum" and answers:
            raise ValueError(
                f"model.classifier_scope is 'sequence_sum', whose decision per row needs the whole row, but model.generation "
                f"asks for {answers} generated answers. Set model.generation.prompts and test_prompts to 0."
            )
        without = {"classifier_coef", "classifier_scope", "classifier_gate", "classifier_threshold"}
        if not self.classifier_layers and (named := [n for n in without if given[n] != _STAGE_2[n]]):
            raise ValueError(
                f"model.{min(named)} is set, but model.classifier_layers is not, so there is no classifier. Name its "
                f"layers, or leave {min(named)} out."
            )
