"""The table of how much text there is: counts that can be checked by hand."""

from pathlib import Path

from tests.processes import run_python
from tests.tiny import byte_level_tokenizer, tiny_model_folder

ROOT = Path(__file__).parents[2]


def test_passages_bytes_and_tokens_are_counted_by_language(tmp_path):
    lines = ["Az oldal nem található.", "Új sor következik.", "Az oldal nem található.", ""]
    (tmp_path / "hu.txt").write_text("\n".join(lines), encoding="utf-8")
    folder = tiny_model_folder(tmp_path / "model")
    done = run_python("tools/language_text.py", tmp_path / "hu.txt", "hu", "--tokenizer", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kept = lines[:2]
    num_bytes = sum(len(line.encode()) for line in kept)
    tokens = sum(len(byte_level_tokenizer()(line)["input_ids"]) for line in kept)
    assert f"| hu | 2 | {num_bytes} | {tokens} | {tokens / num_bytes:.3f} |" in done.stdout
