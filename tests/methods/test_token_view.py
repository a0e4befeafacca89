"""What AlignDistil keeps of single tokens for people to look at."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_llm.callbacks.report_data import read_run
from lit_llm.losses.adaptive_policy import adaptive_coefficient
from lit_llm.methods import token_view
from tests.processes import fit_in_two_processes
from tests.tiny_runs import fit, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the lines of its token_scores.jsonl."""
    config = tiny_config(tmp_path_factory.mktemp("align"), "align_sampled", max_steps=2, val_check_interval=2)
    cli = fit(config, "--model.init_args.generation.shown=3", "--data.init_args.eval_batch_size=2")
    lines = (cli.model.run_folder / "token_scores.jsonl").read_text().splitlines()
    return cli, [json.loads(line) for line in lines]


def frozen_logits(cli, batch) -> list[torch.Tensor]:
    models = (cli.model.teacher, cli.model.other)
    return [model.head(model.hidden(batch.chosen)).double() for model in models]


@torch.no_grad()
def test_scores_of_tokens_are_those_of_the_plain_formulas(run):
    cli, lines = run
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2]
    data, tokenizer = cli.datamodule, cli.model.student_tokenizer
    found = {example: (b, row) for b in data.val_dataloader() for row, example in enumerate(b.examples)}
    for example, line in enumerate(lines[3:]):
        batch, row = found[example]
        pair = data.sets["validation"][example]
        assert line["prompt"] == tokenizer.decode(pair["student_prompt_ids"])
        assert "".join(line["tokens"]) == tokenizer.decode(pair["chosen_ids"])
        of_row_T = batch.chosen.sequence_T == row
        dpo_TV, other_TV = frozen_logits(cli, batch)
        alpha_T = adaptive_coefficient(dpo_TV, other_TV, cli.model.combination).alpha_T[of_row_T]
        gap_TV = dpo_TV.log_softmax(-1) - other_TV.log_softmax(-1)
        reward_T = 0.1 * gap_TV.gather(-1, batch.chosen.target_T[:, None]).squeeze(-1)[of_row_T]
        assert line["scores"]["alpha"] == pytest.approx(alpha_T.tolist(), rel=1e-3)
        assert line["scores"]["reward"] == pytest.approx(reward_T.tolist(), abs=1e-5)
        assert len(line["scores"]["kl_dpo"]) == len(line["tokens"]) and min(line["scores"]["kl_dpo"]) >= 0


def test_the_policy_moves_and_the_frozen_models_do_not(run):
    _, lines = run
    for before, after in zip(lines[:3], lines[3:], strict=True):
        assert before["scores"]["alpha"] == after["scores"]["alpha"]
        assert before["scores"]["reward"] == after["scores"]["reward"]
        assert before["scores"]["kl_dpo"] != after["scores"]["kl_dpo"]


@torch.no_grad()
def test_histograms_hold_every_token_and_percentiles_are_logged(run):
    cli, _ = run
    alpha_T = torch.cat(
        [
            adaptive_coefficient(*frozen_logits(cli, batch), cli.model.combination).alpha_T
            for batch in cli.datamodule.val_dataloader()
        ]
    ).float()
    found = cli.model.histograms
    torch.testing.assert_close(found["alpha"].sort().values, alpha_T.sort().values, rtol=1e-4, atol=1e-5)
    assert set(found) == {"alpha", "tvd", "sampled_alpha", "sampled_tvd"} and found["tvd"].max() <= 1
    metrics = cli.trainer.callback_metrics
    for percent in (50, 95):
        assert metrics[f"val/alpha_p{percent}"].item() == pytest.approx(
            alpha_T.quantile(percent / 100).item(), rel=1e-3
        )
        assert metrics[f"val/sampled_alpha_p{percent}"] > 0
    events = EventAccumulator(str(cli.model.run_folder))
    events.Reload()
    assert set(events.Tags()["histograms"]) == {f"tokens/{name}" for name in found}


def test_the_run_calls_its_teacher_the_dpo_model_and_draws_its_tokens(run):
    cli, _ = run
    record = json.loads((cli.model.run_folder / "environment.json").read_text())["starts"][0]
    assert record["models"]["teacher"]["role"] == "DPO model"
    page = (cli.model.run_folder / "report.html").read_text()
    assert "KL against reward: expected reward" in page and "class=heat" in page and "(DPO model)" in page


def test_many_values_are_thinned_evenly(run, monkeypatch):
    cli, _ = run
    monkeypatch.setattr(token_view, "_MOST_VALUES", 10)
    view = token_view.TokenView(("alpha",), 0)
    for start in (0, 15):
        view.add({"alpha": torch.arange(15.0) + start})
    view.add({"alpha": torch.tensor([torch.nan, torch.inf, -1.0])})
    # every fourth of 33
    assert view.histograms(cli.model)["alpha"].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, -1]
    assert token_view.TokenView(("tvd",), 0).histograms(cli.model)["tvd"].tolist() == []


def test_two_processes_show_what_one_shows(tmp_path):
    config = tiny_config(tmp_path, "align", max_steps=1, val_check_interval=1, dropout=0.0)
    alone = fit(config).model
    done = fit_in_two_processes(config, "--run.version=two", "--data.init_args.batch_size=2")
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (
        [json.loads(line) for line in (folder / "token_scores.jsonl").read_text().splitlines()]
        for folder in (alone.run_folder, alone.run_folder.with_name("two"))
    )
    assert len(ours) == 8 and [line["prompt"] for line in ours] == [line["prompt"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["scores"]["alpha"] == pytest.approx(two["scores"]["alpha"], rel=1e-3, abs=1e-5)
    found = {name: value for name, value in alone.trainer.callback_metrics.items() if name.startswith("val/alpha")}
    last = read_run(alone.run_folder.with_name("two")).last
    assert len(found) == 3
    for name, value in found.items():
        assert last(name) == pytest.approx(value.item(), rel=1e-3), name
