"""The report of runs that add languages: forgetting table, experts, heat-maps; and the lines that it is made of."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_llm.callbacks.language_lines import LanguageLines, picture, without_nan
from lit_llm.callbacks.metrics_csv import MetricsFile
from lit_llm.callbacks.report import write_report
from lit_llm.callbacks.report_heat_map import heat_map
from tests.callbacks.small import SmallMethod, trainer_in
from tests.callbacks.test_report import read, text_of

NAN = float("nan")
REPORT = {
    "groups": {"old": ["en", "fr"], "new": ["hu"]},
    "languages": ["en", "fr", "hu"],
    "moments": [
        ["start", {"en": [2.0, 0.5], "fr": [3.0, 0.4], "hu": [6.0, 0.1]}],
        ["stage 2 (new), step 9", {"en": [2.1, 0.5], "fr": [3.3, 0.4], "hu": [4.0, 0.3]}],
    ],
    "table": "| a | b |",
    "routing": {
        "layers": [0, 4],
        "experts": [3, 2],
        "by_layer": {"max_violation": [0.5, 0.0]},
        "by_language": {
            "expert0_share": [[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]],
            "expert0_top1": [[1.0, 1.0], [0.9, 0.8], [0.1, 0.2]],
            "expert0_prob": [[0.95, 0.9], [0.85, 0.8], [0.15, 0.2]],
            "classifier_acc": [[NAN, 0.99], [NAN, 0.98], [NAN, 0.75]],
            "bypass_share": [[NAN, 0.9], [NAN, 0.9], [NAN, 0.25]],
        },
        "load_shares": [[0.5, 0.25, 0.25], [0.5, 0.5]],
        "parameters": {"total": 2000, "active": 1500},
    },
}
PLAN = {
    "groups": [{"name": "old", "languages": ["en", "fr"]}, {"name": "new", "languages": ["hu"]}],
    "layers": [
        {"experts": [1, 2], "classifier": None},
        *({"experts": [1, 0], "classifier": None} for _ in range(3)),
        {"experts": [1, 1], "classifier": {"scope": "token", "threshold": 0.5}},
    ],
}
COUNTS = {"total": 200_000_000, "dense": 135_000_000, "added": 65_000_000, "trained": 5000}
COUNTS |= {"active": 150_000_000, "active_bypassed": 140_000_000}


@pytest.fixture
def run(tmp_path):
    """A folder as a finished second stage leaves it."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in (0, 9):
        metrics.append({"step": step, "val/loss": 3.0 - step / 9, "val/loss_hu": 6.0 - step / 4, "val/loss_en": 2.0})
        balance = {"train/routing/old_prob_expert0": 0.5 + step / 20, "train/routing/max_violation": 0.3}
        metrics.append({"step": step + 1, "train/loss": 1.0, "train/lpr": 0.2, **balance})
    line = {"step": 9, "stage": "val", **without_nan(REPORT)}
    (tmp_path / "languages.jsonl").write_text(json.dumps({**line, "step": 0}) + "\n" + json.dumps(line) + "\n")
    (tmp_path / "expansion.json").write_text(json.dumps({"plan": PLAN, "parameters": COUNTS}))
    return tmp_path


def test_the_table_tells_each_language_at_each_moment_and_how_far_it_moved(run):
    text = text_of(write_report(run))
    assert "What was learned and forgotten after 9 steps" in text
    assert "start stage 2 (new), step 9 loss moved by" in text
    assert "en old 2.000 ppl 7.389, 50.0% 2.100 ppl 8.166, 50.0% +0.100" in text
    assert "mean of old 2.500 ppl 12.18, 45.0% 2.700 ppl 14.88, 45.0% +0.200" in text
    assert "mean of new 6.000 ppl 403.4, 10.0% 4.000 ppl 54.6, 30.0% -2.000" in text


def test_experts_and_active_parameters_are_told(run):
    text = text_of(write_report(run))
    assert "parameters 200.0 M of the dense model 135.0 M added 65.0 M trained in this stage 5,000" in text
    assert "used by one token 150.0 M" in text and "keep at expert 0 140.0 M" in text
    assert "layer new in all similarity classifier 0 2 3 – –" in text and "4 1 2 – per token" in text


def test_routing_is_drawn_by_language_and_layer_and_load_by_expert(run):
    path = write_report(run)
    text = text_of(path)
    for title in (
        "Probability of expert 0, by language and layer",
        "Load: share of the slots of each expert, by layer",
    ):
        assert title in text
    assert "fr, 4: 0.8" in text and "hu, 0: 0.15" in text
    assert "en, 4: 0.99" in text and "en, 0: 0.99" not in text  # layer 0 has no classifier, and no column
    assert "expert 2, 0: 0.25" in text and "expert 2, 4" not in text
    labels = [attributes["aria-label"] for tag, attributes in read(path).tags if tag == "svg"]
    assert any(label.startswith("Validation loss by language: en ends at 2, hu ends at 3.75") for label in labels)
    training = next(label for label in labels if label.startswith("Training loss"))
    assert "lpr" in training and "routing" not in training


def test_every_language_has_its_curve_however_many_there_are(run):
    languages = ["en", "fr", "hu", "tr", "de", "it", "es", "pt", "nl", "fi"]
    *_, line = [json.loads(text) for text in (run / "languages.jsonl").read_text().splitlines()]
    metrics = MetricsFile(run / "metrics.csv")
    metrics.append({"step": 10, **{f"val/loss_{code}": 2.0 for code in languages}})
    (run / "languages.jsonl").write_text(json.dumps({**line, "languages": languages, "routing": None}) + "\n")
    labels = [attributes["aria-label"] for tag, attributes in read(write_report(run)).tags if tag == "svg"]
    (label,) = [label for label in labels if label.startswith("Validation loss by language")]
    assert all(f"{code} ends at 2" in label for code in languages)


def test_a_run_on_other_data_has_no_such_section(run):
    for name in ("languages.jsonl", "expansion.json"):
        (run / name).unlink()
    assert "#languages" not in write_report(run).read_text()


def test_similarities_that_were_measured_are_drawn(run):
    report = {"similarity": [0.5] * 5, "new_new": None, "new_old": [0.5] * 5, "pairs": {"hu-en": [0.4] * 5}}
    (run / "similarity.json").write_text(json.dumps(report))
    text = text_of(write_report(run))
    assert "Similarity of pairs by layer" in text and "hu-en, 3: 0.4" in text and "0 2 3 0.5000 –" in text


def test_cells_without_a_value_stay_empty_and_a_map_of_nothing_is_no_crash():
    figure = heat_map("a <b>", ["x", "y"], ["0", "1"], [[0.5, NAN], [1.0, 0.0]])
    assert figure.count("<rect") == 3 and "a &lt;b&gt;" in figure and "nan" not in figure
    assert "<svg" in heat_map("empty", [], [], [])


def test_a_validation_leaves_a_line_and_pictures(tmp_path):
    class Routed(SmallMethod):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.language_report = REPORT

    trainer_in(tmp_path, [LanguageLines()], tensorboard=True, max_steps=3).fit(Routed())
    folder = tmp_path / "run" / "version_0"
    (line,) = [json.loads(text) for text in (folder / "languages.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and line["stage"] == "val" and line["moments"] == REPORT["moments"]
    assert line["routing"]["by_language"]["classifier_acc"][0] == [None, 0.99]
    events = EventAccumulator(str(folder)).Reload()
    assert "routing/val/expert0_prob" in events.Tags()["images"]
    assert "languages/val/text_summary" in events.Tags()["tensors"]
    assert "routing/val/load_shares" in events.Tags()["images"]
    (told,) = events.Tensors("experts/val/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    assert "| 0 | 3 | 50.0%, 25.0%, 25.0% |" in text and "| active | 1,500 |" in text


def test_a_picture_goes_from_white_to_blue():
    image = picture([[0.0, 1.0], [NAN, 0.5]])
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == image[-1, 0].tolist() == [255, 255, 255] and image[0, -1].tolist() == [31, 98, 208]
