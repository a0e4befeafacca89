"""Every documented error is provoked once, through the command line, and read as a user would read it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_llm.cli import main
from tests.tiny import sentencepiece_tokenizer, tiny_model_folder
from tests.tiny_runs import fit, tiny_config


def message_of(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code in (1, 2)
    return capfd.readouterr().err


def fit_message(capfd, config: Path, *options: str) -> str:
    return message_of(capfd, "fit", "--config", config, *options)


def test_an_unknown_command_lists_the_known_ones(capfd):
    text = message_of(capfd, "fitt")
    assert "'fitt' is not a command" in text and "Did you mean fit?" in text and "validate, test, predict" in text


def test_a_misspelt_key_is_refused_by_name(tmp_path, capfd):
    assert "kd_wieght" in fit_message(capfd, tiny_config(tmp_path, "kd"), "--model.init_args.kd_wieght=0.1")


def test_a_missing_config_is_named(tmp_path, capfd):
    assert "nowhere.yaml" in fit_message(capfd, tmp_path / "nowhere.yaml")


def test_a_missing_data_file_is_named_with_a_way_out(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--data.init_args.train=nowhere.jsonl")
    assert "nowhere.jsonl" in text and "demo:train" in text


def test_a_wrong_column_lists_those_that_were_found(tmp_path, capfd):
    rows = tmp_path / "other.jsonl"
    rows.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), f"--data.init_args.train={rows}")
    assert "'prompt'" in text and "question" in text and "answer" in text and "data.columns" in text


@pytest.mark.parametrize(
    ("method", "data", "wanted"),
    [
        ("sft", "Preferences", "Instructions"),
        ("dpo", "Instructions", "Preferences"),
        ("dpo", "LabelledAnswers", "Preferences"),
        ("kto", "Preferences", "LabelledAnswers"),
    ],
)
def test_data_of_the_wrong_kind_is_named_with_the_right_one(tmp_path, capfd, method, data, wanted):
    path = tiny_config(tmp_path, method)
    config = yaml.safe_load(path.read_text())
    config["data"] = {"class_path": data, "init_args": {"template": "plain"}}
    path.write_text(yaml.safe_dump(config))
    text = fit_message(capfd, path)
    assert f"data.class_path is {data}. Set data.class_path: {wanted}" in text


@pytest.mark.parametrize("method", ["dpo", "align", "kto"])
def test_compiling_a_loss_that_has_nothing_to_compile_is_refused(tmp_path, capfd, method):
    text = fit_message(capfd, tiny_config(tmp_path, method), "--compile_loss=true")
    assert "compile_loss is true, but no part of" in text


def test_an_unreadable_file_is_named(tmp_path, capfd):
    rows = tmp_path / "broken.jsonl"
    rows.write_text('{"prompt": "a", "response"')
    assert "broken.jsonl" in fit_message(capfd, tiny_config(tmp_path, "sft"), f"--data.init_args.train={rows}")


def test_rows_that_are_all_dropped_give_the_reasons(tmp_path, capfd):
    rows = tmp_path / "empty.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": " "}) + "\n")
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), f"--data.init_args.train={rows}")
    assert "1 dropped (empty answer)" in text


def test_prompts_longer_than_the_limit_can_be_dropped_with_a_count(tmp_path, capfd):
    text = fit_message(
        capfd,
        tiny_config(tmp_path, "sft"),
        "--data.init_args.max_prompt_length=2",
        "--data.init_args.long_prompts=drop",
    )
    assert "24 dropped (prompt too long)" in text and "max_prompt_length 2" in text


def test_limits_that_leave_no_room_are_refused(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--data.init_args.max_prompt_length=48")
    assert "max_prompt_length (48)" in text and "max_length (48)" in text


def test_kd_across_tokenizers_names_the_method_that_can(tmp_path, capfd):
    config = tiny_config(tmp_path, "kd")
    other = tiny_model_folder(tmp_path / "other", family="llama", tokenizer=sentencepiece_tokenizer())
    text = fit_message(capfd, config, f"--model.init_args.teacher.source={other}")
    assert "DSKD" in text and "tokenizers differ" in text


def test_a_model_folder_that_does_not_exist_is_named(tmp_path, capfd):
    assert "nowhere" in fit_message(capfd, tiny_config(tmp_path, "sft"), "--model.init_args.student.source=./nowhere")


def test_a_chat_template_that_the_tokenizer_lacks_is_refused(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--data.init_args.template=chat")
    assert "chat template" in text and "alpaca" in text


def test_a_share_outside_its_range_is_refused(tmp_path, capfd):
    assert "kd_weight is 1.5" in fit_message(capfd, tiny_config(tmp_path, "kd"), "--model.init_args.kd_weight=1.5")


def test_two_warm_ups_are_refused_naming_both(tmp_path, capfd):
    text = fit_message(
        capfd,
        tiny_config(tmp_path, "sft"),
        "--model.init_args.optimization.warmup_steps=2",
        "--model.init_args.optimization.warmup_ratio=0.1",
    )
    assert "warmup_steps" in text and "warmup_ratio" in text


def test_settings_of_dskd_that_exclude_each_other_are_refused_naming_both(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "dskd"), "--model.init_args.projectors.bias=true")
    assert "projectors.start" in text and "projectors.bias" in text


def test_a_run_folder_that_exists_is_not_written_over(tmp_path, capfd):
    config = tiny_config(tmp_path, "sft", max_steps=1)
    fit(config, "--run.version=mine")
    text = fit_message(capfd, config, "--run.version=mine")
    assert "mine exists" in text and "--ckpt_path last" in text


def test_resuming_without_a_checkpoint_says_where_it_looked(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--ckpt_path", "last")
    assert "last.ckpt" in text and "runs/sft" in text


def test_a_truncated_checkpoint_is_refused(tmp_path, capfd):
    config = tiny_config(tmp_path, "sft", max_steps=1)
    fit(config)
    last = tmp_path / "runs/sft/version_0/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-500])
    assert "not a whole checkpoint" in fit_message(capfd, config, "--ckpt_path", "last")


def test_a_checkpoint_of_another_method_is_refused_with_both_names(tmp_path, capfd):
    fit(tiny_config(tmp_path / "a", "sft", max_steps=1))
    last = tmp_path / "a/runs/sft/version_0/checkpoints/last.ckpt"
    text = fit_message(capfd, tiny_config(tmp_path / "b", "kd"), "--ckpt_path", last)
    assert "'SFT'" in text and "'KD'" in text


def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path, capfd):
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, foreign)
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--ckpt_path", foreign)
    assert "not written by lit_llm" in text


def test_a_loss_that_is_not_a_number_stops_the_run_naming_the_step(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--model.init_args.optimization.lr=1e30")
    assert "step" in text and ("nan" in text.lower() or "finite" in text.lower()) and "lr" in text


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "sft"), "--data.init_args.batch_size=100")
    assert "24 usable examples" in text and "100" in text


def test_testing_without_test_data_is_refused(tmp_path, capfd):
    config = tiny_config(tmp_path, "sft")
    settings = yaml.safe_load(config.read_text())
    settings["data"]["init_args"]["test"] = None
    config.write_text(yaml.safe_dump(settings))
    assert "data.test" in message_of(capfd, "test", "--config", config)


def test_exporting_over_a_folder_is_refused(tmp_path, capfd):
    config = tiny_config(tmp_path, "sft", max_steps=1)
    fit(config)
    (tmp_path / "there").mkdir()
    text = message_of(capfd, "export", "--config", config, "--ckpt_path", "last", "--to", tmp_path / "there")
    assert "there exists" in text


def test_supervising_prompts_of_two_tokenizers_is_refused(tmp_path, capfd):
    text = fit_message(capfd, tiny_config(tmp_path, "dskd_cross"), "--data.init_args.supervise=all")
    assert "data.supervise" in text


def test_methods_for_two_tokenizers_name_another_one_for_a_single_tokenizer(tmp_path, capfd):
    one = tmp_path / "student"
    for method, instead in (("mined_cross", "KD"), ("shared_cross", "KD"), ("gold_cross", "ULD")):
        text = fit_message(capfd, tiny_config(tmp_path, method), f"--model.init_args.teacher.source={one}")
        assert "share one of" in text and f"Use {instead} (configs/" in text


@pytest.mark.parametrize(("method", "needed"), [("mined_cross", "'minimum_edit'"), ("uld", "'kth'")])
def test_a_pairing_that_the_method_cannot_use_is_refused_naming_both(tmp_path, capfd, method, needed):
    text = fit_message(capfd, tiny_config(tmp_path, method), "--data.init_args.alignment=bytes")
    assert "data.alignment is 'bytes'" in text and needed in text


def test_settings_of_the_hybrid_are_refused_without_it(tmp_path, capfd):
    config = tiny_config(tmp_path, "gold_cross")
    assert "model.hybrid is false" in fit_message(capfd, config, "--model.init_args.beta=0.3")
    text = fit_message(capfd, config, "--model.init_args.hybrid=true", "--model.init_args.matched_weight=0.3")
    assert "matched_weight is 0.3" in text and "unmatched_weight is None" in text


def test_compiling_without_a_compiler_names_what_is_missing(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = fit_message(capfd, tiny_config(tmp_path, "kd"), "--compile_loss=true")
    assert "compile_loss is true" in text and "no-such-compiler" in text


def test_a_store_and_sampled_answers_exclude_each_other(tmp_path, capfd):
    config = tiny_config(tmp_path, "kd_sampled")
    text = fit_message(capfd, config, f"--model.init_args.teacher_store.folder={tmp_path / 'store'}")
    assert "model.teacher_store.folder" in text and "model.on_policy" in text
