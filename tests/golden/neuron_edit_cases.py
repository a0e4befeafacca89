"""Golden cases of the neuron editor: each kind builds its requests from token ids and compares every field.

The index of this family has no roles: a field that is not an input is expected. Errors are measured as the index says:
the largest difference relative to the largest stored number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_llm.editing.attribution import attributed_neurons, integrated_gradients
from lit_llm.editing.closed_form import AlphaEdit, Bakeable, bake, free_directions, grouped_keys, memit, rome
from lit_llm.editing.covariance import second_moments
from lit_llm.editing.fine_tuning import FineTuning, fine_tune
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.locate import Locating, locate, scores, select
from lit_llm.editing.optimise import FactRows, Optimising, SharedValues
from lit_llm.editing.passes import neurons_at, run
from lit_llm.editing.rows import Row, padded
from lit_llm.editing.values import Request, ValueSettings
from lit_llm.losses.head import Head

INPUTS = {
    "input_ids", "attention_mask", "prompt_ids", "prompt_len", "lookup", "target_ids", "target_len", "target_id",
    "kl_prompt_ids", "kl_prompt_len", "kl_lookup", "lang_of_row", "tie.scores",
}  # fmt: skip


class Case:
    """One case in one precision, with the tiny model that it belongs to."""

    def __init__(self, entry: dict[str, Any], index: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
        self.hparams, self.dtype, self.folder, self.entry = entry["hyper_parameters"], dtype, folder, entry
        self.tolerance = entry["tolerance"][str(dtype).removeprefix("torch.")]
        self._stored = load_file(folder / entry["file"])
        assert set(self._stored) == set(entry["fields"]), "the index and the file list different tensors"
        self._described = index["models"][entry["model"]]
        self._compared: set[str] = set()
        self.body, self.head = self.model()

    def model(self) -> tuple[FeedForwards, Head]:
        """The model as it is before any edit."""
        import transformers

        architecture = getattr(transformers, self._described["architecture"])
        config = architecture.config_class(**self._described["config"], attn_implementation="eager")
        model = architecture(config).to(self.dtype).eval()
        weights = load_file(self.folder / self._described["file"])
        missing, unexpected = model.load_state_dict({k: v.to(self.dtype) for k, v in weights.items()}, strict=False)
        assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
        model.tie_weights()
        layer = model.get_output_embeddings()
        return FeedForwards(model), Head(layer.weight.detach(), layer.bias)

    def __getitem__(self, name: str) -> Tensor:
        assert name in INPUTS, f"{name} is expected, not an input"
        return self._stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def expected(self, prefix: str = "") -> list[str]:
        return [name for name in self._stored if name not in INPUTS and name.startswith(prefix)]

    def check(self, name: str, value: Tensor | list) -> None:
        assert name not in INPUTS
        stored, value = self._stored[name], torch.as_tensor(value).detach()
        assert stored.shape == value.shape, f"{name}: {tuple(value.shape)} instead of {tuple(stored.shape)}"
        self._compared.add(name)
        if not stored.is_floating_point():
            assert torch.equal(stored, value.long()), f"{name}: {value.tolist()} instead of {stored.tolist()}"
            return
        error = (stored.double() - value.double()).abs().max() / stored.abs().max()
        assert error <= self.tolerance, f"{name}: off by {error.item():.3g}, allowed {self.tolerance}"

    def finish(self) -> None:
        forgotten = sorted(set(self.expected()) - self._compared)
        assert self._compared and not forgotten, f"expected, but not compared: {forgotten}"

    def covariances(self) -> dict[int, Tensor]:
        stored = load_file(self.folder / self.entry["uses_covariance_of"])
        return {int(name[2:]): value for name, value in stored.items() if name.startswith("C.")}

    def rows(self) -> list[Row]:
        lookups = self["lookup"].tolist() if "lookup" in self else [0] * len(self["prompt_len"])
        return [
            Row(prompt[:length], lookup, target[:target_length])
            for prompt, length, lookup, target, target_length in zip(
                self["prompt_ids"].tolist(),
                self["prompt_len"].tolist(),
                lookups,
                self["target_ids"].tolist(),
                self["target_len"].tolist(),
                strict=True,
            )
        ]

    def essence(self, of: Case | None = None) -> list[Row]:
        source = of or self
        fields = (source["kl_prompt_ids"], source["kl_prompt_len"], source["kl_lookup"])
        return [Row(ids[:length], at) for ids, length, at in zip(*(f.tolist() for f in fields), strict=True)]

    def requests(self, contexts: int, essence: list[Row]) -> list[Request]:
        rows = self.rows()
        return [
            Request(tuple(rows[start : start + contexts]), essence[start // contexts])
            for start in range(0, len(rows), contexts)
        ]

    def value_settings(self) -> ValueSettings:
        return ValueSettings(
            evaluations=self.hparams["v_num_grad_steps"],
            learning_rate=self.hparams["v_lr"],
            weight_decay=self.hparams["v_weight_decay"],
            clamp=self.hparams["clamp_norm_factor"],
            kl_weight=self.hparams["kl_factor"],
            stop_loss=self.hparams.get("stop_loss", 0.05),
        )


def check_cov(case: Case, index: dict) -> None:
    lengths = case["attention_mask"].sum(-1).tolist()
    texts = [ids[:length] for ids, length in zip(case["input_ids"].tolist(), lengths, strict=True)]
    layers = sorted(int(name[2:]) for name in case.expected())
    found = second_moments(case.body, texts, layers, batch_tokens=60)
    assert found.tokens == sum(lengths)
    for layer in layers:
        case.check(f"C.{layer}", found.moments[layer])


def check_memit(case: Case, index: dict) -> None:
    layers, contexts = case.hparams["layers"], case.hparams["contexts_per_request"]
    assert case.hparams["context_weights"][0] == 0.5 and len(set(case.hparams["context_weights"][1:])) == 1
    requests = case.requests(contexts, case.essence())
    from lit_llm.editing.values import optimise_values, outputs_at

    bare = [request.rows[0] for request in requests]
    case.check("z_init", outputs_at(case.body, bare, case.hparams["z_layer"], "block").T)
    case.check(
        "z",
        optimise_values(
            case.body, case.head, requests, case.hparams["z_layer"], "block", case.value_settings()
        ).value_Fd.T,
    )
    keys = {layers[0]: grouped_keys(case.body, requests, layers[0])}
    updates = memit(
        case.body,
        case.head,
        requests,
        layers,
        case.covariances(),
        case.value_settings(),
        covariance_weight=case.hparams["lambda_cov"],
    )
    for layer in layers[1:]:  # the keys of a layer depend on the layers below it only
        keys[layer] = grouped_keys(case.body, requests, layer)
    for layer in layers:
        case.check(f"K.{layer}", keys[layer])
        case.check(f"adj_k.{layer}", updates[layer].right)
        case.check(f"resid.{layer}", updates[layer].left)
        case.check(f"dW.{layer}", updates[layer].dense())
    case.check("edited_last_logits", last_logits(case.body, case.head, bare))


def check_rome(case: Case, index: dict) -> None:
    contexts = len(case.rows()) // len(case.essence())
    settings = {**case.hparams, "stop_loss": 0.05}
    case.hparams = settings
    covariance = case.covariances()[settings["layer"]]
    for kind, used in (("adj", covariance), ("plain", None)):
        for number, request in enumerate(case.requests(contexts, case.essence())):
            body, head = case.model()
            update = rome(body, head, request, settings["layer"], used, case.value_settings())[settings["layer"]]
            case.check(f"{kind}.{number}.u", update.right[:, 0])
            case.check(f"{kind}.{number}.v", update.left[:, 0])
            case.check(f"{kind}.{number}.dW", update.dense())


def check_alphaedit(case: Case, index: dict) -> None:
    memit_entry = next(
        entry for entry in index["cases"] if entry["case"] == "memit" and entry["model"] == case.entry["model"]
    )
    beside = Case(memit_entry, index, case.folder, case.dtype)
    contexts = beside.hparams["contexts_per_request"]
    requests = case.requests(contexts, case.essence(beside))
    covariances = case.covariances()
    free = {
        layer: free_directions(covariances[layer], threshold=threshold)
        for layer, threshold in zip(case.hparams["layers"], case.hparams["nullspace_threshold"], strict=True)
    }
    for layer, directions in free.items():
        case.check(f"P.{layer}", directions.projection())
    sequence = AlphaEdit(free, beside.value_settings(), ridge=case.hparams["L2"])
    from lit_llm.editing.values import optimise_values

    for number, chosen in enumerate(case.hparams["batches"]):
        batch = [requests[index] for index in chosen]
        values = optimise_values(
            case.body, case.head, batch, case.hparams["layers"][-1], "block", beside.value_settings()
        )
        case.check(f"z.b{number}", values.value_Fd.T)
        updates = sequence.edit(case.body, case.head, batch)
        for layer in case.hparams["layers"]:
            case.check(f"dW.b{number}.{layer}", updates[layer].dense())
            if f"cache_c.b{number}.{layer}" in case:
                case.check(f"cache_c.b{number}.{layer}", sequence.earlier[layer] @ sequence.earlier[layer].T)


def check_ft(case: Case, index: dict) -> None:
    for kind, objective in (("ftl", "prompt_last"), ("ftm", "answer")):
        settings = FineTuning(
            objective=objective,
            learning_rate=case.hparams["lr"],
            epochs=case.hparams["num_steps"],
            bound=case.hparams[kind]["norm_constraint"],
        )
        change = fine_tune(case.body, case.head, case.rows(), case.hparams["layer"], settings)
        case.check(f"{kind}.dW", change.weight)
        if f"{kind}.db" in case:
            case.check(f"{kind}.db", change.bias)


def check_kn(case: Case, index: dict) -> None:
    (prompt,) = case["prompt_ids"].tolist()
    row = Row(prompt, 0, case["target_id"].tolist())
    for name, site in (("pre", "up"), ("down_in", "neuron")):
        found = integrated_gradients(case.body, case.head, row, steps=case.hparams["steps"], site=site)
        case.check(f"scores_{name}", found)
        coarse = attributed_neurons(found, case.hparams["adaptive_threshold"])
        case.check(f"coarse_{name}", torch.tensor(coarse).view(-1, 2))


def check_lafn(case: Case, index: dict) -> None:
    _check_locating(case)
    _check_tie(case)
    for apply in sorted({name.split(".")[1] for name in case.expected("upd.") if not name.startswith("upd.norm2")}):
        _check_updates(case, apply)
    _check_bake(case)


def _check_locating(case: Case) -> None:
    hparams = case.hparams["locate"]
    layers, rows = hparams["layers"], [row.bare() for row in case.rows()]
    found = neurons_at(case.body, rows, layers, position=hparams["position"])
    language = case["lang_of_row"].tolist()
    for layer in layers:
        case.check(f"h.{layer}", found[layer])
        norm_m = case.body.weight(layer).norm(dim=0)
        score = {
            name.split(".")[1]: scores(found[layer], language, name.split(".")[1], norm_m)
            for name in case.expected("score.")
            if name.endswith(f".{layer}")
        }
        for statistic, value in score.items():
            case.check(f"score.{statistic}.{layer}", value)
        for name in case.expected("sel."):
            if name.endswith(f".{layer}"):
                _, statistic, *rule = name.removesuffix(f".{layer}").split(".")
                located = locate(score[statistic], _locating(statistic, ".".join(rule), hparams, layer))
                case.check(name, located.neurons)


def _locating(statistic: str, rule: str, hparams: dict, layer: int) -> Locating:
    """The settings that the name of a field stands for."""
    settings: dict[str, Any] = {"statistic": statistic, "min_neurons": 1, "max_neurons": 10**6}
    if rule.startswith("topk.intersection"):
        settings["top_ratio"] = hparams["topk_ratio"]
        ending = rule.removeprefix("topk.intersection").removeprefix(".")
        if ending.startswith("cap"):
            settings["max_neurons"] = int(ending.removeprefix("cap"))
        elif ending == "floor":
            settings["min_neurons"] = hparams["floor_min"][str(layer)]
        else:
            assert not ending, rule
    elif rule.startswith("thresh") and rule.endswith(".intersection"):
        threshold = float(rule.removeprefix("thresh").removesuffix(".intersection"))
        settings |= {"selection": "threshold", "threshold": threshold}
    else:
        share, votes = rule.removeprefix("ratio").split(".vote")
        settings |= {"selection": "ratio", "ratio": float(share), "combination": "vote", "votes": int(votes)}
    return Locating(**settings)


def _check_tie(case: Case) -> None:
    score_Lm = case["tie.scores"]
    selected = select(score_Lm, Locating(top_ratio=4 / score_Lm.shape[1], min_neurons=1)).all(0)
    case.check("tie.sel_topk4", selected.nonzero().flatten())


def _check_updates(case: Case, apply: str) -> None:
    values, hparams = shared_values(case, apply), case.hparams["update"]
    for s, layer in enumerate(hparams["layers"]):
        if f"upd.norm2.{layer}" in case:
            case.check(f"upd.norm2.{layer}", values.norm_FS[:, s])
    optimizer = torch.optim.Adam([values.delta_FSn], lr=hparams["lr"])
    for step in range(hparams["steps"] + 1):
        losses = values.backward()
        told = torch.stack([losses.total_F[0], losses.nll_F[0], losses.kl_F[0], losses.decay_F[0]])
        case.check(f"upd.{apply}.loss.{step}", told)
        for s, layer in enumerate(hparams["layers"]):
            if step:
                case.check(f"upd.{apply}.delta.{step}.{layer}", values.of_fact(0)[layer])
            if step < hparams["steps"]:
                gradient = values.delta_FSn.grad[0, s, : len(values.of_fact(0)[layer])]
                case.check(f"upd.{apply}.grad.{step}.{layer}", gradient)
        case.check(f"upd.{apply}.nll_rows.{step}", losses.nll_rows[0])
        if step < hparams["steps"]:
            values.update(optimizer)
    _check_edited_logits(case, apply, values)


def shared_values(case: Case, apply: str) -> SharedValues:
    """The one fact of the case, with the neurons that the index names."""
    hparams = case.hparams["update"]
    rows, language = case.rows(), case["lang_of_row"].tolist()
    neurons = {layer: case._stored[f"{hparams['neurons']}.{layer}"] for layer in hparams["layers"]}
    optimising = Optimising(
        learning_rate=hparams["lr"],
        steps=hparams["steps"],
        kl_weight=hparams["kl_factor"],
        weight_decay=hparams["weight_decay"],
        clamp=hparams["clamp_factor"],
        apply=apply,
    )
    facts = [FactRows(tuple(rows), tuple(language), tuple(case.essence()))]
    return SharedValues(case.body, case.head, facts, [neurons], optimising)


def _check_edited_logits(case: Case, apply: str, values: SharedValues) -> None:
    rows = [row.bare() for row in values.facts[0].first_rows()]
    chosen, found = values.of_fact(0), []
    for row in rows:  # one by one, with the plainest hook that adds the values

        def add(layer: int, row=row):
            def change(neurons_Nm: Tensor) -> Tensor:
                changed = neurons_Nm.clone()
                index = case._stored[f"{case.hparams['update']['neurons']}.{layer}"]
                until = len(row.prompt) if apply == "tail" else row.lookup + 1
                changed[row.lookup : until, index] += chosen[layer].to(changed.dtype)
                return changed

            return change

        with case.body.at_inputs({layer: add(layer) for layer in chosen}):
            found.append(last_logits(case.body, case.head, [row])[0])
    case.check(f"upd.{apply}.last_prompt_logits", torch.stack(found))


def _check_bake(case: Case) -> None:
    hparams = case.hparams["update"]
    optimised = case._stored
    layers = hparams["layers"]
    rows = tuple(case.rows()[index] for index in hparams["bake_rows"])
    neurons = {layer: optimised[f"{hparams['neurons']}.{layer}"] for layer in layers}
    values = {layer: optimised[f"upd.lookup.delta.{hparams['steps']}.{layer}"] for layer in layers}
    body, _ = case.model()
    fact = Bakeable(rows, neurons, values, apply_to_end=False)
    before = {layer: neurons_at(body, list(rows), [layer])[layer].T for layer in layers[:1]}
    (parts,) = bake(body, [fact], case.covariances(), covariance_weight=hparams["bake_lambda"])
    for layer in layers:
        keys = before.get(layer)
        case.check(f"bake.K.{layer}", neurons_at(body, list(rows), [layer])[layer].T if keys is None else keys)
        case.check(f"bake.value.{layer}", parts[layer].left[:, 0])
        case.check(f"bake.dW.{layer}", parts[layer].dense())


@torch.no_grad()
def last_logits(body: FeedForwards, head: Head, rows: list[Row]) -> Tensor:
    """Logits after the last token of each prompt."""
    grid = padded([row.prompt for row in rows])
    return head(run(body, grid).flatten(0, 1)[grid.flat([len(row.prompt) - 1 for row in rows])])


HANDLERS = {
    "cov": check_cov,
    "memit": check_memit,
    "rome": check_rome,
    "alphaedit": check_alphaedit,
    "ft": check_ft,
    "kn": check_kn,
    "lafn": check_lafn,
}
