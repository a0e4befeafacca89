"""report.html, from whole, partial and missing files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lit_llm.callbacks.metrics_csv import ContinueMetrics, MetricsFile
from lit_llm.callbacks.report import Report, write_report
from lit_llm.callbacks.report_chart import Level, Series, line_chart, number, ticks
from lit_llm.callbacks.report_data import read_run
from lit_llm.callbacks.run_record import RunRecord
from lit_llm.callbacks.samples import Samples
from lit_llm.callbacks.step_axis import StepAxis
from lit_llm.callbacks.throughput import Throughput
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from tests.callbacks.small import SmallMethod, trainer_in
from tests.callbacks.test_hf_export import StopAt

VOID = {"meta", "br", "line", "circle", "path"}


class Nesting(HTMLParser):
    """Fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and tag != "li":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID and tag != "li":
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def read(path: Path) -> Nesting:
    parsed = Nesting()
    parsed.feed(path.read_text())
    assert not parsed.open
    return parsed


def text_of(path: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(read(path).text))


@pytest.fixture
def run(tmp_path):
    """A folder as a finished run of DSKD leaves it, with text that would break a careless page."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in range(41):
        if step % 20 == 0:
            teacher = {"val/teacher_loss": 1.0, "val/teacher_rouge_l": 0.5}
            metrics.append({"step": step, "epoch": 0, "val/loss": 3 - step / 40, "val/rouge_l": step / 100, **teacher})
        if step:
            loss = float("nan") if step == 7 else 4 / step
            metrics.append({"step": step, "train/loss": loss, "train/kd": 1 / step, "train/learning_rate": 1e-4})
    sample = {"stage": "val", "prompt": "<script>alert(1)</script>", "reference": "a & b"}
    lines = [{**sample, "step": step, "answers": {"student": f"<i>{step}</i>", "teacher": "t"}} for step in (20, 40)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {
        "class_path": "lit_llm.methods.DSKD",
        "init_args": {"student": {"source": "small"}, "teacher": {"source": "big"}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    start = {"stage": "fit", "step": 0, "command": "python -m lit_llm fit", "started": "now", "python": "3.10"}
    ended = {"status": "finished", "seconds": 75.0}
    models = {"student": {"parameters": 1_000_000}, "teacher": {"parameters": 2_000_000}, "one_tokenizer": True}
    record = {"starts": [{**start, "models": models, "ended": ended}]}
    (tmp_path / "environment.json").write_text(json.dumps(record))
    return tmp_path


def test_the_headline_tells_start_student_teacher_and_the_share_of_the_gap_closed(run):
    text = text_of(write_report(run))
    assert "DSKD finished" in text and "big → small" in text
    assert "Loss per token 3.000 2.000 1.000 50%" in text
    assert "ROUGE-L of generated answers 0.000 0.400 0.500 80%" in text
    assert "1 min 15 s" in text and "python -m lit_llm fit" in text


def test_losses_of_two_tokenizers_are_not_compared(run):
    record = json.loads((run / "environment.json").read_text())
    record["starts"][0]["models"]["one_tokenizer"] = False
    (run / "environment.json").write_text(json.dumps(record))
    text = text_of(write_report(run))
    assert "Loss per token 3.000 2.000 1.000 –" in text and "0.400 0.500 80%" in text
    assert "tokenizers differ" in text


def test_text_of_models_and_data_cannot_become_markup(run):
    page = write_report(run).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "a &amp; b" in page
    assert "<i>40</i>" not in page


def test_the_page_needs_no_network(run):
    tags = read(write_report(run)).tags
    references = [attrs[key] for _, attrs in tags for key in ("src", "href") if key in attrs]
    assert references and all(reference.startswith("#") for reference in references)
    assert not {"script", "link", "img"} & {tag for tag, _ in tags}
    assert "url(" not in (run / "report.html").read_text() and "@import" not in (run / "report.html").read_text()


def test_figures_show_what_was_logged_and_say_what_was_not_finite(run):
    text = text_of(write_report(run))
    for title in ("Training loss and its terms", "Validation loss", "ROUGE-L of generated answers", "Learning rate"):
        assert title in text
    assert "Gradient norm" not in text
    assert "1 values are not finite" in text


def test_the_last_samples_are_shown_with_the_student_over_time(run):
    text = text_of(write_report(run))
    assert "after 40 steps" in text
    assert "the student over time step 20 <i>20</i> step 40 <i>40</i>" in text


@pytest.mark.parametrize("missing", ["metrics.csv", "samples.jsonl", "config.yaml", "environment.json"])
def test_a_missing_file_is_said_to_be_missing(run, missing):
    (run / missing).unlink()
    assert f"Missing: {missing}" in text_of(write_report(run))


def test_an_empty_folder_has_a_report_too(tmp_path):
    text = text_of(write_report(tmp_path))
    assert text.count("Missing:") == 6 and tmp_path.name in text


def test_files_that_a_kill_cut_short_are_read_as_far_as_they_go(run):
    for name in ("metrics.csv", "samples.jsonl", "config.yaml"):
        content = (run / name).read_text()
        (run / name).write_text(content[:-4])
    data = read_run(run)
    assert data.curve("train/loss")[-1][0] == 39 and len(data.samples) == 1 and data.config == {}
    text = text_of(write_report(run))
    assert "Validation data after 40 steps" in text and "Answers on validation data after 20 steps" in text


def callbacks(*more):
    recorded = [StepAxis(), ContinueMetrics(), RunRecord(), Samples(), Report(), ValidateAtStart()]
    return [Throughput(), *more, *recorded]


def report_of(folder) -> str:
    return text_of(folder / "run/version_0/report.html")


def test_a_real_run_ends_with_a_report_and_a_test_adds_to_it(tmp_path):
    trainer = trainer_in(tmp_path, callbacks())
    trainer.fit(SmallMethod())
    text = report_of(tmp_path)
    assert "finished" in text and "Validation data after 6 steps" in text and "Tokens per second" in text
    trainer.save_checkpoint(tmp_path / "at6.ckpt")
    evaluating = [StepAxis(), RunRecord(), Samples(), Report()]
    trainer_in(tmp_path, evaluating).test(SmallMethod(), ckpt_path=tmp_path / "at6.ckpt", weights_only=False)
    text = report_of(tmp_path)
    assert "finished" in text and "Answers on test data after 6 steps" in text and "Validation data" in text


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(RuntimeError("out of luck"), RuntimeError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
def test_a_run_that_broke_has_a_report_that_says_so(tmp_path, error, raised, status):
    with pytest.raises(raised):
        trainer_in(tmp_path, callbacks(StopAt(error))).fit(SmallMethod())
    text = report_of(tmp_path)
    assert f"version_0 {status}" in text
    assert ("RuntimeError: out of luck" in text) == (status == "failed")


def test_a_run_under_way_has_a_report_from_its_first_validation_on(tmp_path):
    import lightning as L

    class Look(L.Callback):
        def on_train_batch_start(self, *args):
            assert "running or killed" in report_of(tmp_path)

    trainer_in(tmp_path, callbacks(Look())).fit(SmallMethod())


def test_a_chart_survives_odd_values():
    for points in ([(1, 0.0)], [(1, 2.0), (2, 2.0)], [(0, -1e-9), (5, 1e-9)], [(1, 1e30), (2, 1.0)]):
        figure = line_chart("a <b>", [Series("x", points, "red")], [Level("level", points[0][1], "blue")])
        assert "<svg" in figure and "nan" not in figure and "<b>" not in figure.split("</figcaption>")[0]


def test_a_long_curve_stays_small_and_keeps_its_spikes():
    points = [(step, 1.0 + step % 3) for step in range(100_000)]
    points[54_321] = (54_321, 50.0)
    figure = line_chart("loss", [Series("loss", points, "red", noisy=True)])
    assert len(figure) < 30_000
    assert 'class="faint"' in figure and re.search(r"L\d+\.\d 10\.0L", figure)


def test_ticks_are_round_numbers_inside_the_interval():
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 47, 5) == [10, 20, 30, 40]


@pytest.mark.parametrize(("value", "text"), [(0.051321, "0.05132"), (1234.5, "1,234"), (1e-5, "1.0e-5"), (0.0, "0")])
def test_numbers_are_written_for_reading(value, text):
    assert number(value) == text
