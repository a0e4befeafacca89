"""The loss doctor measures every term beside the training and changes nothing of it."""

import csv
import random
import warnings

import numpy
import pytest
import torch

from lit_llm.callbacks.loss_doctor import LossDoctor
from tests.methods.test_every_method import state
from tests.tiny_runs import METHODS, fit, tiny_config

QUIET = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
TERMS = {"sft": {"ce"}} | {m: {"ce", "kd"} for m in METHODS if not m.startswith(("sft", "dskd"))}
TERMS |= {m: {"preference"} for m in METHODS if m.startswith(("dpo", "kto"))}
TERMS |= {m: {"kl"} for m in METHODS if m.startswith("align")}
TERMS |= {"dckd": {"ce", "kl_chosen", "kl_rejected"}, "adpa": {"ce", "advantage"}}
DUAL = {"ce", "t2s_ce", "t2s_kd", "s2t_kd"}


def with_doctor(every: int = 2) -> tuple[str, ...]:
    return (f"--trainer.callbacks=[{{class_path: LossDoctor, init_args: {{every_n_steps: {every}}}}}]",)


def doctor_rows(cli) -> dict[int, dict[str, float]]:
    with (cli.model.run_folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = {}
    for row in rows:
        values = {name: float(value) for name, value in row.items() if name.startswith("doctor/") and value}
        if values:
            kept[int(row["step"])] = values
    return kept


# one of each kind of training step
KINDS = (
    *("sft", "kd", "dskd_v1", "dskd_cross", "dskd_cross_cma", "gold_cross", "kd_sampled"),
    *("dpo", "align", "dckd", "adpa", "kto"),
)


@pytest.mark.parametrize("method", KINDS)
def test_weights_are_the_same_bit_for_bit_with_and_without_it(tmp_path, method):
    config = tiny_config(tmp_path, method, max_steps=3, accumulate_grad_batches=2)
    plain = fit(config, *QUIET)
    draws = torch.rand(3), random.random(), numpy.random.rand()
    examined = fit(config, *QUIET, *with_doctor())
    for name, value in state(plain.model).items():
        assert torch.equal(value, state(examined.model)[name]), name
    assert torch.equal(torch.rand(3), draws[0]) and random.random() == draws[1] and numpy.random.rand() == draws[2]

    rows = doctor_rows(examined)
    assert set(rows) == {0, 2}
    names = {name.removeprefix("doctor/") for name in rows[0] if not name.endswith("_norm")}
    assert names == TERMS.get(method, DUAL)


class Compare(LossDoctor):
    """Keeps the terms' gradients and compares their sum with the gradient of the step that follows."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = torch.get_rng_state()
        self.values, self.sums = {}, {}
        for name, term in pl_module.loss_terms(batch).items():
            torch.set_rng_state(state)
            value = term()
            self.values[name] = float(value.detach())
            names, parameters = zip(*pl_module.named_parameters(), strict=True)
            for which, gradient in zip(names, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    self.sums[which] = self.sums.get(which, 0) + gradient
        torch.set_rng_state(state)

    def on_before_backward(self, trainer, pl_module, loss):
        assert sum(self.values.values()) == pytest.approx(float(loss.detach()), rel=1e-5)

    def on_after_backward(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            assert torch.allclose(parameter.grad, self.sums[name], rtol=1e-3, atol=1e-6), name
        self.compared = True


# the doctor looks at the data, sampled answers are not its business
@pytest.mark.parametrize("method", [method for method in METHODS if "sampled" not in method])
def test_values_and_gradients_of_the_terms_add_up_to_those_of_the_step(tmp_path, method, monkeypatch):
    import lit_llm.training_cli as cli

    compare, usual = Compare(), cli.default_callbacks
    monkeypatch.setattr(cli, "default_callbacks", lambda **settings: [*usual(**settings), compare])
    fit(tiny_config(tmp_path, method, max_steps=1), *QUIET)
    assert compare.compared


def test_the_projected_teacher_trains_only_the_projectors(tmp_path):
    rows = doctor_rows(fit(tiny_config(tmp_path, "dskd", max_steps=1), *QUIET, *with_doctor()))[0]
    assert "doctor/t2s_ce_grad_norm" not in rows and rows["doctor/t2s_ce_projector_grad_norm"] > 0
    assert "doctor/ce_projector_grad_norm" not in rows and rows["doctor/ce_grad_norm"] > 0
    assert rows["doctor/s2t_kd_grad_norm"] > 0


def warned(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "LossDoctor" in str(w.message)]


def test_a_term_below_one_percent_of_another_is_named_once_with_both_numbers(tmp_path):
    config = tiny_config(tmp_path, "kd", max_steps=3)
    text = warned(lambda: fit(config, *QUIET, *with_doctor(1), "--model.init_args.kd_weight=0.0005"))
    assert len(text) == 1
    assert "the size of kd is" in text[0] and "of that of ce" in text[0] and "model.kd_weight" in text[0]
    rows = doctor_rows(fit(config, *QUIET, *with_doctor(1), "--model.init_args.kd_weight=0.0005"))
    for number in (rows[0]["doctor/kd"], rows[0]["doctor/ce"]):
        assert f"{number:.3g}" in text[0]


def test_balanced_terms_and_a_term_that_is_switched_off_are_left_alone(tmp_path):
    config = tiny_config(tmp_path, "kd", max_steps=1)
    assert not warned(lambda: fit(config, *QUIET, *with_doctor(), "--model.init_args.kd_weight=0.999"))
    assert not warned(lambda: fit(config, *QUIET, *with_doctor(), "--model.init_args.kd_weight=0"))
    cli = fit(config, *QUIET, *with_doctor(), "--model.init_args.kd_weight=0")
    assert set(doctor_rows(cli)[0]) == {"doctor/ce", "doctor/ce_grad_norm"}


def test_a_strategy_that_divides_weights_is_refused_by_name():
    class Sharded:
        strategy = object()

    with pytest.raises(ValueError, match=r"trainer\.strategy is object.*trainer\.callbacks"):
        LossDoctor().setup(Sharded(), None, "fit")
    with pytest.raises(ValueError, match="every_n_steps is -1"):
        LossDoctor(every_n_steps=-1)
