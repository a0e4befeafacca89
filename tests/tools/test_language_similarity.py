"""The similarity tool: files of any kind, a report that the allocation reads, figures, readable errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lit_llm.evaluation.language_similarity import SimilarityReport
from lit_llm.models.allocation import by_budget
from tests.processes import Finished, run_python
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    "en": ["The cat sat on the mat.", "A dog saw the cat.", "", "It was a good day for both."],
    "hu": ["A macska a szőnyegen ült.", "Egy kutya látta a macskát."],
    "tr": ["Kedi halının üzerinde oturdu.", "Bir köpek kediyi gördü."],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"en": tmp_path / "en.txt", "hu": tmp_path / "hu.txt.gz", "tr": tmp_path / "tr.jsonl.gz"}
    found["en"].write_text("\n".join(TEXTS["en"]) + "\n", encoding="utf-8")
    with gzip.open(found["hu"], "wt", encoding="utf-8") as file:
        file.write("\n".join(TEXTS["hu"]) + "\n")
    with gzip.open(found["tr"], "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"body": text}) for text in TEXTS["tr"]) + "\n")
    return found


def tool(folder: Path, *options: str) -> Finished:
    return run_python(ROOT / "tools" / "language_similarity.py", folder / "model", *options, cwd=ROOT)


def test_files_of_all_kinds_give_a_report_that_experts_are_allocated_by(files, tmp_path):
    tiny_model_folder(tmp_path / "model", "gpt2", layers=3)
    out = tmp_path / "there" / "similarity.json"
    options = ["--old", f"en={files['en']}", "--new", f"hu={files['hu']}", "--out", str(out)]
    done = tool(tmp_path, *options, "--tokens", "20")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| layer | S |" in done.stdout and str(out) in done.stdout
    report = SimilarityReport.read(out)
    assert list(report.pairs) == ["hu-en"] and report.new_new is None and len(report.similarity) == 3
    assert report.languages["en"].tokens == 20 and report.languages["en"].group == "old"
    assert len(by_budget(report.similarity, 7).experts) == 3
    assert out.with_suffix(".html").read_text(encoding="utf-8").count("<svg") == 2

    again = tool(tmp_path, *options, "--tokens", "20")
    assert again.returncode == 0 and SimilarityReport.read(out) == report  # the draw is seeded
    other = tool(tmp_path, *options, "--tokens", "20", "--seed", "1")
    assert other.returncode == 0 and SimilarityReport.read(out).languages != report.languages


def test_a_column_is_named_and_errors_are_sentences(files, tmp_path):
    tiny_model_folder(tmp_path / "model")
    pair = ["--old", f"en={files['en']}", "--new", f"tr={files['tr']}", "--out", str(tmp_path / "s.json")]
    assert "no column 'text'" in tool(tmp_path, *pair).stderr
    assert tool(tmp_path, *pair, "--column", "nothing").returncode == 1
    twice = ["--old", f"en={files['en']}", "--new", f"en={files['hu']}"]
    assert "error: Language 'en' is named twice" in tool(tmp_path, *twice).stderr
    assert "error: No data file at" in tool(tmp_path, "--old", "en=no.txt", "--new", f"hu={files['hu']}").stderr
