"""From similarity of languages to the plan of an expanded model: measured, allocated, told and written down."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn

from lit_llm.data.languages import Languages
from lit_llm.evaluation.language_similarity import MeasuredLanguage, SimilarityReport, aggregate, measure
from lit_llm.methods.layer_moe_settings import Expand, Similarity
from lit_llm.models import allocation, surgery
from lit_llm.models.allocation import Allocation
from lit_llm.models.expansion_plan import ExpansionPlan, LanguageGroup
from lit_llm.models.language_model import LanguageModel
from lit_llm.models.sharding import whole_numel
from lit_llm.storage import write_atomically


def plan_expansion(
    student: LanguageModel,
    data: Languages,
    expand: Expand,
    similarity: Similarity | None,
    folder: Path,
    strategy,
) -> ExpansionPlan:
    """Decide how the student grows for the newest group of the data; nothing is changed yet.

    Prints the similarities and the experts of each layer, and leaves similarity.json and allocation.yaml (a config that
    repeats the allocation) in the run folder.

    Args:
        student: dense, or expanded for all groups but the newest.
        data: its languages, already set up.
        expand: how many experts.
        similarity: how it is measured; None: with the defaults, where the rule needs it.
        folder: of the run.
        strategy: Lightning's; rank 0 measures for all.

    Raises:
        ValueError: groups of model and data do not fit, or the rule cannot be applied.
    """
    model = student.transformer
    current = surgery.plan_of(model)
    check_groups(current, data, added=1)
    report = None
    if similarity is not None or expand.by_similarity:
        report = _similarity(student, data, similarity or Similarity(), strategy)
        _fits(report, model, data)
    found = allocate(expand, len(surgery.decoder_layers(model)), report)
    _tell(folder, expand, found, report, None if current is None else current.expert_counts)
    if current is None:
        first = data.group_names[0]
        current = surgery.dense_plan(model, first, list(data.groups[first]), expand.experts_per_token)
    elif expand.experts_per_token != current.experts_per_token:
        raise ValueError(
            f"expand.experts_per_token is {expand.experts_per_token}, but the student was expanded with "
            f"{current.experts_per_token}. Set the same number."
        )
    about = {"rule": found.rule, "value": found.value}
    return current.with_group(data.group_names[-1], data.newest, found.experts, _kept(report, similarity), about)


def check_groups(plan: ExpansionPlan | None, data: Languages, added: int = 0) -> None:
    """The groups of the data against those that the student knows: the same names and languages, in the same order.

    Args:
        plan: of the student; None: it is dense and knows the first group, whatever that is called.
        data: its groups of languages.
        added: how many of the last ones the student does not know yet.

    Raises:
        ValueError: they are others, or in another order.
    """
    given = [LanguageGroup(name, list(languages)) for name, languages in data.groups.items()]
    known = given[:1] if plan is None else plan.groups
    named = given[: len(given) - added]
    same = len(named) == len(known) and all(
        # a plan that was made by hand may leave out the languages
        ours.name == theirs.name and (not theirs.languages or sorted(ours.languages) == sorted(theirs.languages))
        for ours, theirs in zip(named, known)
    )
    if same and (plan is not None or added):
        return
    step = "Name the same groups, or set model.student.source to a model that stage 1 expanded for them (model.expand)."
    if added:
        step = "Name the groups that it knows first, as they were, then the one to be added."
    raise ValueError(
        f"data.groups has {_words(given)}, but the student knows {_words(known)}"
        f"{', and an expansion adds one group' if added else ''}. Experts and classifiers belong to groups by their place, so "
        f"names, languages and the order of groups must be the same.\n  {step}"
    )


def _words(groups: list[LanguageGroup]) -> str:
    listed = ", ".join(f"{group.name} ({' '.join(group.languages)})" for group in groups)
    return f"{len(groups)} group{'' if len(groups) == 1 else 's'}: {listed}"


def allocate(expand: Expand, layers: int, report: SimilarityReport | None) -> Allocation:
    """Experts per layer by the rule that is set.

    Raises:
        ValueError: the rule cannot be applied, or adds nothing.
    """
    found = _by_rule(expand, layers, report)
    if not any(found.new):
        raise ValueError(
            f"expand.{found.rule} is {found.value}, which comes to 1 expert in every layer, the original MLP, so nothing "
            f"would be added. Raise it."
        )
    return found


def _by_rule(expand: Expand, layers: int, report: SimilarityReport | None) -> Allocation:
    if expand.experts is not None:
        return allocation.listed(expand.experts, layers)
    if expand.uniform is not None:
        return allocation.uniform(layers, expand.uniform)
    if expand.delta is not None:
        return allocation.by_delta(report.similarity, expand.delta, expand.min_experts)
    return allocation.by_budget(report.similarity, layers + expand.new_experts, expand.min_experts)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of an expanded model: in all, dense, added, trained, and those that one token uses.

    `active` is for a token that routers divide among k experts, `active_bypassed` for one that every classifier sends to
    expert 0 alone.
    """
    total = sum(whole_numel(p) for p in model.parameters())
    dense = sum(whole_numel(p) for _, p in surgery.base_parameters(model))
    active = bypassed = dense
    for routed in surgery.routed_layers(model).values():
        expert = sum(whole_numel(p) for p in routed.base.parameters())
        router = whole_numel(routed.router.weight)
        used = (min(routed.experts_per_token, routed.num_experts) - 1) * expert + router
        deciding = 0 if routed.classifier is None else whole_numel(routed.classifier.weight)
        active += used + deciding
        bypassed += deciding if routed.classifier is not None else used
    trained = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
    counts = {"total": total, "dense": dense, "added": total - dense, "trained": trained, "active": active}
    return {**counts, "active_bypassed": bypassed}


@rank_zero_only
def write_expansion(folder: Path, model: nn.Module) -> None:
    """Leave the plan and the parameter counts of an expanded model in the run folder."""
    content = {"plan": surgery.plan_of(model).to_dict(), "parameters": parameter_counts(model)}
    write_atomically(folder / "expansion.json", json.dumps(content, indent=1) + "\n")


def _similarity(student: LanguageModel, data: Languages, settings: Similarity, strategy) -> SimilarityReport:
    if settings.file is not None:
        path = Path(settings.file)
        if not path.is_file():
            raise FileNotFoundError(
                f"similarity.file is {settings.file}, which does not exist (looked from {Path.cwd()})."
            )
        rank_zero_info(f"Similarity of languages is read from {path}; nothing is measured.")
        return SimilarityReport.read(path)
    found: dict[str, Any] | None = None
    if strategy.is_global_zero:
        found = asdict(_measured(student, data, settings, strategy.root_device))
    found = strategy.broadcast(found, src=0)
    languages = {name: MeasuredLanguage(**fields) for name, fields in found.pop("languages").items()}
    return SimilarityReport(**found, languages=languages)


def _measured(student: LanguageModel, data: Languages, settings: Similarity, device) -> SimilarityReport:
    model = student.transformer.to(device)
    groups = {name: "new" if name in data.newest else "old" for name in data.languages}
    # the languages to be added first, as pairs are named
    ordered = sorted(data.languages, key=lambda name: groups[name] == "old")
    wanted = settings.tokens_per_language
    vectors, measured = measure(
        model.base_model,
        [layer.mlp for layer in surgery.decoder_layers(model)],
        {name: data.documents(name) for name in ordered},
        groups,
        tokens_per_language=wanted,
        skipped_ids=student.tokenizer.all_special_ids if settings.skip_special_tokens else (),
        max_length=settings.max_length,
        batch_tokens=settings.batch_tokens,
        told=rank_zero_info,
    )
    return aggregate(
        {name: of.mean_LH.cpu() for name, of in vectors.items()},
        groups,
        measured,
        model=student.transformer.name_or_path,
        seed=data.split_seed,
        tokens_per_language=wanted,
        skip_special_tokens=settings.skip_special_tokens,
    )


def _fits(report: SimilarityReport, model: nn.Module, data: Languages) -> None:
    """Whether a report, perhaps from a file, is of this model and these languages; what it does not name is not asked."""
    layers = len(surgery.decoder_layers(model))
    if len(report.similarity) != layers:
        raise ValueError(
            f"The similarity report has {len(report.similarity)} layers, but the student has {layers}: it is of another model "
            f"({report.model or 'unnamed'}). Measure this one."
        )
    measured = {group: [n for n, of in report.languages.items() if of.group == group] for group in ("new", "old")}
    wanted = {"new": data.newest, "old": [name for name in data.languages if name not in data.newest]}
    for group in ("new", "old") if report.languages else ():
        if set(measured[group]) != set(wanted[group]):
            raise ValueError(
                f"The similarity report has the {group} languages {', '.join(measured[group]) or '(none)'}, but those of "
                f"data.groups are {', '.join(wanted[group])}. Measure these, or correct similarity.file."
            )
    if report.model and report.model != model.name_or_path:
        rank_zero_warn(
            f"The similarity report is of {report.model}, but the student is {model.name_or_path}. If they are not the same "
            f"model, leave similarity.file out: then it is measured."
        )


def _kept(report: SimilarityReport | None, settings: Similarity | None) -> dict[str, Any] | None:
    """What the plan keeps of a report: enough to choose classifier layers in the review stage."""
    if report is None:
        return None
    return {
        "file": None if settings is None else settings.file,
        "seed": report.seed,
        "tokens": report.tokens_per_language,
        "measured": {name: found.tokens for name, found in report.languages.items()},
        "similarity": report.similarity,
        "new_old": report.new_old,
    }


@rank_zero_only
def _tell(
    folder: Path, expand: Expand, found: Allocation, report: SimilarityReport | None, before: list[int] | None
) -> None:
    arguments: dict[str, Any] = {"expand": expand.overlay(found.experts)}
    if report is not None:
        rank_zero_info(report.text())
        report.write(folder / "similarity.json")
        # classifier layers of stage 2 are chosen by it; the whole path, so that it is found from any folder
        arguments["similarity"] = {"file": str((folder / "similarity.json").resolve())}
    rank_zero_info(found.text(before))
    overlay = {"model": {"init_args": arguments}}
    head = "# The experts per layer of this run as a list. After its config, it repeats the run without measuring.\n"
    write_atomically(folder / "allocation.yaml", head + yaml.safe_dump(overlay, sort_keys=False))
