"""Files that grow by whole lines."""

from lit_llm.callbacks.append_only import append_lines, keep_lines, whole_lines


def test_lines_are_appended_in_a_folder_that_did_not_exist(tmp_path):
    path = tmp_path / "a" / "lines"
    append_lines(path, "one\n")
    append_lines(path, "two\nthree\n")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_line_cut_by_a_killed_process_is_dropped_by_the_next_append(tmp_path):
    path = tmp_path / "lines"
    path.write_text("one\ntw")
    assert whole_lines(path) == ["one"]
    append_lines(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def test_a_file_that_holds_nothing_but_a_cut_line_starts_anew(tmp_path):
    path = tmp_path / "lines"
    path.write_text("o")
    append_lines(path, "one\n")
    assert path.read_text() == "one\n"


def test_keep_lines_says_how_many_it_dropped_and_leaves_nothing_beside_the_file(tmp_path):
    path = tmp_path / "lines"
    path.write_text("1\n2\n3\n")
    assert keep_lines(path, lambda line: int(line) < 3) == 1
    assert path.read_text() == "1\n2\n" and [file.name for file in tmp_path.iterdir()] == ["lines"]


def test_a_missing_file_has_no_lines(tmp_path):
    assert keep_lines(tmp_path / "none", bool) == 0 and not (tmp_path / "none").exists()
