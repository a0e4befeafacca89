"""The report of runs on preference pairs: headline, KL against reward, answers token by token."""

import json

import pytest
import yaml

from lit_llm.callbacks.metrics_csv import MetricsFile
from lit_llm.callbacks.report import write_report
from lit_llm.callbacks.report_chart import point_chart
from lit_llm.callbacks.report_data import read_run
from tests.callbacks.test_report import read, text_of

KL_FIGURE = "KL against reward"


@pytest.fixture
def run(tmp_path):
    """A folder as a finished run of AlignDistil on sampled answers leaves it."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in (0, 20, 40):
        frozen = {"val/dpo_reward_accuracy": 0.71, "val/contrastive_reward_accuracy": 0.74, "val/teacher_reward": 0.6}
        sampled = {"val/sampled_kl_start_of_answer": step / 8, "val/sampled_expected_reward_of_answer": step / 100}
        policy = {"val/reward_accuracy": 0.1 + step / 100, "val/reward": 0.4 + step / 200, "val/kl_dpo": 0.3}
        policy["val/reward_margin"] = step / 10
        metrics.append({"step": step, "val/loss": 2.0 - step / 100, "val/alpha": 1.5, **frozen, **policy, **sampled})
        metrics.append({"step": step + 1, "train/loss": 1.0, "train/alpha": 9.0, "train/kl": 0.1})
    scores = {"alpha": [0.5, 2.0, 1.0, 0.0], "reward": [0.02, -0.04, float("nan"), 0.0], "kl_dpo": [0, 0, 0, 1.25]}
    line = {"stage": "val", "prompt": "Say <b>", "tokens": ["It", " <i>", "", "\n"], "scores": scores}
    lines = [{**line, "step": step, "tokens": [f"at {step}", *line["tokens"][1:]]} for step in (20, 40)]
    (tmp_path / "token_scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"student": {"source": "small"}, "dpo": {"source": "runs/align/stages/dpo/0123/model"}}
    model = {"class_path": "lit_llm.methods.AlignDistil", "init_args": models}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    sizes = {"student": {"parameters": 1000}, "teacher": {"parameters": 2_000_000, "role": "DPO model"}}
    start = {"stage": "fit", "step": 0, "command": "c", "started": "now", "models": {**sizes, "one_tokenizer": True}}
    (tmp_path / "environment.json").write_text(json.dumps({"starts": [start]}))
    return tmp_path


def spans_of(path) -> list[dict]:
    return [attributes for tag, attributes in read(path).tags if tag == "span" and "title" in attributes]


def test_the_headline_tells_checks_orders_and_divergences_in_words(run):
    text = text_of(write_report(run))
    assert "start student DPO model gap closed" in text
    assert "Share of the prompt's checks that generated answers keep 0.400 0.600 0.600 100%" in text
    assert "reward of the policy – 0.500 – –" in text  # at the start every margin is 0: no order to compare with
    assert "reward of the DPO model – – 0.710 –" in text and "contrastive reward – – 0.740 –" in text
    assert "KL to the DPO model, per token 0.300 0.300 – –" in text and "Loss 2.000 1.600 – –" in text
    assert "KL to the start, per token" not in text and "Loss per token" not in text


def test_the_start_orders_pairs_where_it_is_not_the_reference(run):
    text = text_of(write_report(run))
    assert "policy, step 20: 0.3" in text and "policy, step 0: 0.1" not in text
    (run / "metrics.csv").write_text("step,val/reward_accuracy,val/reward_margin\n0,0.25,0.5\n4,0.75,0.9\n")
    text = text_of(write_report(run))
    assert "reward of the policy 0.250 0.750 – –" in text and "policy, step 0: 0.25" in text


def test_reverse_dpo_is_best_where_it_orders_fewest_pairs(run):
    (run / "metrics.csv").write_text("step,val/reward_accuracy,val/reward\n2,0.1,0.5\n4,0.3,0.4\n")
    assert "best 0.500 at step 2" in text_of(write_report(run)) and "best 0.100" not in text_of(run / "report.html")
    model = {"class_path": "DPO", "init_args": {"student": {"source": "small"}, "reverse": True}}
    (run / "config.yaml").write_text(json.dumps({"model": model}))
    text = text_of(write_report(run))
    assert "reward of the policy best 0.100 at step 2" in text and "best 0.500" not in text


def test_the_teacher_is_called_what_it_is(run):
    text = text_of(write_report(run))
    assert "stage dpo (DPO model) → small" in text and "DPO model 2.0 M parameters" in text


def test_kl_against_reward_has_a_point_a_validation_for_each_reward(run):
    path = write_report(run)
    text = text_of(path)
    assert f"{KL_FIGURE}: expected reward" in text and f"{KL_FIGURE}: share of checks kept" in text
    for step, divergence, reward in ((0, "0", "0"), (20, "2.5", "0.2"), (40, "5", "0.4")):
        assert f"step {step}: KL to the start, per answer {divergence}, expected reward {reward}" in text
    labels = [attributes["aria-label"] for tag, attributes in read(path).tags if tag == "svg"]
    assert any(label.endswith("expected reward 0.4 at step 40") for label in labels)


def test_runs_without_sampled_answers_or_without_pairs_have_no_such_figure(run):
    lines = (run / "metrics.csv").read_text().replace("val/sampled_kl_start_of_answer", "val/other")
    (run / "metrics.csv").write_text(lines)
    assert KL_FIGURE not in text_of(write_report(run))
    (run / "metrics.csv").write_text("step,val/loss,val/rouge_l\n4,2.0,0.1\n")
    text = text_of(write_report(run))
    assert "Loss per token" in text and "Validation pairs" not in text


def test_the_divergence_to_the_dpo_model_stands_in_where_the_start_is_not_watched(run):
    lines = (run / "metrics.csv").read_text().replace("sampled_kl_start_of_answer", "sampled_kl_dpo_of_answer")
    (run / "metrics.csv").write_text(lines)
    assert "step 20: KL to the DPO model, per answer 2.5" in text_of(write_report(run))


def test_training_figures_leave_values_of_another_size_out(run):
    labels = [attributes["aria-label"] for tag, attributes in read(write_report(run)).tags if tag == "svg"]
    training = next(label for label in labels if label.startswith("Training loss"))
    assert "loss ends" in training and "kl ends" in training and "alpha" not in training


def test_the_last_answers_are_shown_token_by_token_with_their_numbers(run):
    path = write_report(run)
    text, spans = text_of(path), spans_of(path)
    assert "Preferred answers of validation data after 40 steps" in text and "at 40 <i> · ↵" in text
    assert "at 20" not in text and "&lt;i&gt;" in path.read_text()
    assert [span["title"] for span in spans[:2]] == [
        "alpha 0.5, reward 0.02, KL to the DPO model 0",
        "alpha 2, reward -0.04, KL to the DPO model 0",
    ]
    assert len(spans) == 8 and [span["style"] for span in spans[:4]] == ["--x:0.15", "--x:0.60", "--x:0.30", "--x:0.00"]
    assert [span.get("class") for span in spans[4:]] == [None, "below", None, None]
    assert [span["style"] for span in spans[4:]] == ["--x:0.30", "--x:0.60", "--x:0.00", "--x:0.00"]
    assert "alpha 0 2 or beyond" in text and "reward -0.04 0.04 or beyond" in text
    assert "#tokens" in path.read_text()


def test_colours_of_tokens_exist_in_both_themes(run):
    style = write_report(run).read_text()
    assert style.count("--above:") == 2 == style.count("--below:")


def test_a_long_answer_is_cut_and_a_run_without_tokens_has_no_such_section(run):
    line = {"step": 9, "stage": "val", "prompt": "p", "tokens": ["a"] * 1000, "scores": {"alpha": [1.0] * 1000}}
    (run / "token_scores.jsonl").write_text(json.dumps(line) + "\n")
    path = write_report(run)
    assert "700 more tokens are not shown" in text_of(path) and len(spans_of(path)) == 300
    (run / "token_scores.jsonl").unlink()
    assert "#tokens" not in write_report(run).read_text() and read_run(run).token_scores is None


def test_points_may_coincide_and_their_labels_do_not_overlap():
    points = [(1.0, 1.0, str(step)) for step in range(50)] + [(2.0, 3.0, "50")]
    for some in (points[:1], points):
        figure = point_chart("a <b>", some, ("x", "y"))
        assert "nan" not in figure and figure.count("<circle") == len(some)
        assert figure.count('class=tick x="') < 20


def test_a_run_on_labelled_answers_shows_its_labels_and_no_order_of_pairs(run):
    rows = ("step,val/loss,val/label_accuracy,val/good_reward,val/bad_reward", "0,0.5,0.5,0,0", "8,0.4,0.8,0.2,-0.3")
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    text = text_of(write_report(run))
    assert "Answers on their label's side of the baseline – 0.800" in text  # at the start every reward is 0
    assert "Rewards of labelled answers, validation" in text and "Pairs in the data's order" not in text


def test_a_run_with_one_teacher_does_not_speak_of_a_combined_one(run):
    config = {"model": {"class_path": "DCKD", "init_args": {"student": {"source": "a"}, "teacher": {"source": "b"}}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = (
        "step,train/kl_chosen,val/reward_accuracy,val/kl_chosen,val/agreement",
        "4,1.5,0.5,1.0,0.5",
        "8,1.1,0.6,0.9,0.6",
    )
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    text = text_of(write_report(run))
    assert "Agreement with the teacher, validation" in text and "KL to the teacher per token, validation" in text
