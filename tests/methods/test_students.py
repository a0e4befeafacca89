"""Whole methods with packed rows, token budgets, adapters and quantised students: the same losses, exact resume."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.data.batch import DistillationBatch, collate_pairs, collate_tokens
from lit_llm.data.token_alignment import align_answers, token_spellings
from lit_llm.methods.dskd import DSKD
from lit_llm.methods.dskd_settings import Projectors
from lit_llm.methods.kd import KD
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.projector import ClosedFormStudentToTeacher
from lit_llm.training_cli import TrainingCLI
from tests.processes import fit_in_two_processes
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer
from tests.tiny_runs import fit, largest_gap, tiny_config

TEXTS = [
    ("Name a cat. ", "The cat saw naïve dogs."),
    ("Say. ", "Paris"),
    ("And? ", "Red, green and blue."),
    ("A ", "b c"),
]
PACKED = ["--data.init_args.pack_to=96", "--data.init_args.batch_size=2"]
BUDGET = ["--data.init_args.batch_size=null", "--data.init_args.batch_tokens=120"]
QUIET = ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=3"]


def state(cli) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in cli.model.state_dict().items()}


# ---------------------------------------------------------------- packing


def batch_of(cross: bool, row_sizes) -> DistillationBatch:
    ours, theirs = byte_level_tokenizer(), sentencepiece_tokenizer()

    def side(tokenizer):
        parts = [[tokenizer(t, add_special_tokens=False)["input_ids"] for t in pair] for pair in TEXTS]
        ids = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in parts]
        prompts = [len(prompt) for prompt, _ in parts]
        return ids, prompts, collate_tokens(ids, prompts, 0, row_sizes)

    ids, prompts, student = side(ours)
    count = student.num_supervised
    if not cross:
        return DistillationBatch(student, None, None, None, count, count, 0, (0, 1, 2, 3))
    teacher_ids, teacher_prompts, teacher = side(theirs)
    spellings = token_spellings(ours), token_spellings(theirs)
    pairs = [
        align_answers(i[p:], j[q:], *spellings, rule="bytes")
        for i, p, j, q in zip(ids, prompts, teacher_ids, teacher_prompts, strict=True)
    ]
    paired = collate_pairs(student, teacher, [a for a, _ in pairs], [b for _, b in pairs])
    return DistillationBatch(student, teacher, *paired, count, len(paired[0]), 0, (0, 1, 2, 3))


@pytest.mark.parametrize("name", ["kd", "dskd", "dskd_cross", "dskd_cross_cma"])
def test_packed_rows_give_the_loss_and_the_gradients_of_single_ones(tmp_path, name):
    tiny_config(tmp_path, name, dropout=0.0)
    specs = [ModelSpec(source=str(tmp_path / who), attention="sdpa") for who in ("student", "teacher")]
    torch.manual_seed(0)
    version = "v1" if name == "dskd_cross_cma" else "v2"
    method = KD(*specs) if name == "kd" else DSKD(*specs, projectors=Projectors(version=version))
    method.configure_model()
    method.double().train()
    method._trainer = type("T", (), {"global_step": 0})()

    def gradients(row_sizes):
        batch = batch_of("cross" in name, row_sizes)
        more = {"kd_weight": 0.5} if name == "kd" else {"kd_denominator": 3.0}
        method.zero_grad()
        loss = method.loss(batch, method.teacher_hidden(batch), ce_weight=0.5, **more).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}

    loss, single = gradients(None)
    for row_sizes in ([4], [1, 3], [2, 2]):
        packed_loss, packed = gradients(row_sizes)
        torch.testing.assert_close(packed_loss, loss, rtol=1e-9, atol=1e-9)
        assert largest_gap(packed, single) < 1e-9


@pytest.mark.parametrize("options", [PACKED, BUDGET], ids=["packed", "budget"])
@pytest.mark.parametrize("method", ["sft", "dskd_cross"])
def test_accumulating_gives_the_step_of_one_large_batch(tmp_path, method, options):
    """One epoch in one step, however it is cut: the mean over all its tokens."""
    labelled = ["--model.init_args.projectors.masked_mean=labelled"] if "dskd" in method else []
    options = [*options, *labelled, "--trainer.precision=64-true", *QUIET, "--trainer.max_steps=1"]
    config = tiny_config(tmp_path / "one", method, dropout=0.0)
    whole = fit(config, *labelled, "--trainer.precision=64-true", *QUIET, "--trainer.max_steps=1",
                "--data.init_args.batch_size=24", "--data.init_args.bucket=1")  # fmt: skip
    config = tiny_config(tmp_path / "many", method, dropout=0.0, accumulate_grad_batches=100)
    parts = fit(config, *options)
    assert parts.trainer.num_training_batches > 3
    assert largest_gap(state(parts), state(whole)) < 1e-6


@pytest.mark.parametrize("options", [PACKED, BUDGET], ids=["packed", "budget"])
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_with_limits_of_tokens_resumes_exactly(tmp_path, options, step):
    options = [*options, "--trainer.accumulate_grad_batches=2"]
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd_cross"), *options)
    config = tiny_config(tmp_path / "broken", "dskd_cross")
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *options, "--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}")
    resumed = fit(config, *options, "--ckpt_path", "last")
    assert resumed.trainer.global_step == 8
    assert largest_gap(state(resumed), state(unbroken)) == 0


@pytest.mark.parametrize("options", [PACKED, BUDGET], ids=["packed", "budget"])
def test_the_schedule_knows_how_many_steps_an_epoch_has(tmp_path, options):
    ends = ["--trainer.max_steps=-1", "--trainer.max_epochs=3", *QUIET, "--trainer.val_check_interval=null"]
    run = fit(tiny_config(tmp_path, "sft", accumulate_grad_batches=2), *options, *ends)
    assert run.trainer.global_step == run.trainer.estimated_stepping_batches
    assert run.trainer.current_epoch == 3


@pytest.mark.parametrize("options", [PACKED, BUDGET], ids=["packed", "budget"])
def test_two_processes_with_limits_of_tokens_take_the_step_of_one(tmp_path, options):
    options = [*options, *QUIET, "--trainer.max_steps=1"]
    one = tiny_config(tmp_path / "one", "sft", dropout=0.0, accumulate_grad_batches=100)
    ours = fit(one, *options)
    two = tiny_config(tmp_path / "two", "sft", dropout=0.0, accumulate_grad_batches=100)
    done = fit_in_two_processes(two, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "two/runs/sft/version_0/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert largest_gap(state(ours), theirs) < 2e-5


# ---------------------------------------------------------------- adapters


LORA = ["--model.init_args.student.lora.rank=4"]


@pytest.mark.parametrize("method", ["kd", "dskd", "dskd_cross"])
def test_adapters_learn_while_base_and_head_stay_and_the_export_is_merged(tmp_path, method):
    run = fit(tiny_config(tmp_path, method, val_check_interval=2), *LORA, "--trainer.max_steps=5")
    before = load_file(tmp_path / "student" / "model.safetensors")
    parameters = dict(run.model.student.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert all(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)  # they start at zero
    assert torch.equal(run.model.student.head.weight_VD, before["transformer.wte.weight"])

    saved = ModelSpec(source=str(run.model.run_folder / "model")).load().eval()
    assert not any("lora" in name for name, _ in saved.named_parameters())
    batch = collate_tokens([[5, 6, 7, 8, 9, 10], [20, 21, 22]], [1, 1], 0)
    run.model.student.eval()
    torch.testing.assert_close(saved.hidden(batch), run.model.student.hidden(batch), rtol=1e-4, atol=1e-5)
    ours = load_file(run.model.run_folder / "model" / "model.safetensors")
    assert torch.equal(ours["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not torch.equal(ours["transformer.h.0.attn.c_attn.weight"], before["transformer.h.0.attn.c_attn.weight"])


@pytest.mark.parametrize(("options", "times"), [(LORA, 1), ([], 5)], ids=["adapters", "all weights"])
def test_the_closed_form_map_is_formed_once_under_adapters_and_every_step_without(
    tmp_path, monkeypatch, options, times
):
    formed, weight = [], ClosedFormStudentToTeacher.weight

    def counted(self, *heads):
        formed.append(weight(self, *heads))
        return formed[-1]

    monkeypatch.setattr(ClosedFormStudentToTeacher, "weight", counted)
    fit(tiny_config(tmp_path, "dskd", val_check_interval=2), *options, "--trainer.max_steps=5",
        "--trainer.limit_val_batches=0")  # fmt: skip
    assert len(formed) == times
    assert (largest_gap({"S": formed[0]}, {"S": formed[-1]}) > 0) == (times > 1)


def test_a_run_with_adapters_resumes_exactly(tmp_path):
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd"), *LORA)
    config = tiny_config(tmp_path / "broken", "dskd")
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *LORA, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=3")
    assert largest_gap(state(fit(config, *LORA, "--ckpt_path", "last")), state(unbroken)) == 0


@pytest.mark.skipif(
    not (find_spec("bitsandbytes") and find_spec("accelerate")), reason="bitsandbytes or accelerate is not installed"
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_student_and_teacher_train_stop_resume_and_are_saved_plain(tmp_path, kind):
    options = [
        *LORA,
        f"--model.init_args.student.quantization={kind}",
        f"--model.init_args.teacher.quantization={kind}",
    ]
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd"), *options)
    config = tiny_config(tmp_path / "broken", "dskd")
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *options, "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=3")
    resumed = fit(config, *options, "--ckpt_path", "last")
    assert largest_gap(state(resumed), state(unbroken)) == 0
    assert all("lora" in name or not name.startswith("student.") for name in state(resumed))
    TrainingCLI.run(["export", "--config", str(config), *options, "--ckpt_path", "last", "--to", str(tmp_path / "to")])
    saved = [ModelSpec(source=str(place)).load() for place in (resumed.model.run_folder / "model", tmp_path / "to")]
    assert all(p.dtype == torch.float32 for p in saved[0].parameters())
    assert largest_gap(*(model.state_dict() for model in saved)) == 0
