"""Text out of wheels: the machine's own pip runs, pointed at a folder of wheels made here."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from lit_llm.data import package_text as module
from lit_llm.data.package_text import COLLECTIONS, TEXTS, TextPackage, package_text
from lit_llm.storage import cache_folder
from tests.data.test_message_catalogues import write_mo
from tests.models.tiny_gguf import write_wheel

USERS_CACHE = cache_folder()  # read before the tests get a cache of their own


def catalogue(prefix: str, number: int, translated: bool = True) -> bytes:
    lines = ['msgid ""\nmsgstr ""\n']
    for i in range(number):
        words = "nem található már sehol" if translated else ""
        lines.append(
            f'#: views/{i // 10}.py:{i}\nmsgid "Page {i} was not found anywhere any more."\n'
            f'msgstr "{f"{prefix} {i} {words}." if translated else ""}"\n'
        )
    return "\n".join(lines).encode()


FILES = {
    "tool/__init__.py": b"raise SystemExit",
    "tool/locale/en/LC_MESSAGES/django.po": catalogue("", 40, translated=False),
    "tool/locale/hu/LC_MESSAGES/django.po": catalogue("Az oldal", 40),
    "tool/locale/hu/LC_MESSAGES/django.mo": write_mo(
        {"Something else is here now.": "Itt most valami egészen más van."}
    ),
    "tool/locale/tr_TR/LC_MESSAGES/django.po": catalogue("Sayfa", 30),
    "tool/locale/es_ES/LC_MESSAGES/django.po": catalogue("Página", 20),
    "tool/locale/es_MX/LC_MESSAGES/django.po": catalogue("Hoja", 20),
    "tool/locale/zh_Hans/LC_MESSAGES/django.po": catalogue("页", 20),
    "tool/locale/zh_Hant/LC_MESSAGES/django.po": catalogue("頁", 20),
    "tool/translations/pl/LC_MESSAGES/messages.mo": write_mo({"Page was not found.": "Strony nigdzie nie znaleziono."}),
}


@pytest.fixture
def tool(index):
    return write_wheel(index, "tool", FILES)


def known(monkeypatch, wheel, digest=None) -> None:
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(TEXTS, "tool", TextPackage("1.0", digest, "MIT", 1))


def in_cache() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "text").iterdir() if not path.name.endswith(".lock"))


def test_a_wheel_becomes_one_file_of_passages_for_each_language(tool):
    (file,) = package_text("tool==1.0", "hu")
    lines = file.read_text().splitlines()
    assert len(lines) > 2 and lines[0].startswith("Az oldal 0 nem található már sehol. Az oldal 1 ")
    assert " ".join(lines).count("Az oldal") == 40 and "egészen" not in " ".join(lines)
    manifest = json.loads((file.parent / "lit_llm_text.json").read_text())
    assert (
        manifest["passages"]["hu"] == len(lines) and manifest["sha256"] == hashlib.sha256(tool.read_bytes()).hexdigest()
    )
    assert in_cache() == ["tool-1.0"]


def test_english_is_what_the_fullest_translation_is_made_from(tool):
    (file,) = package_text("tool==1.0", "en")
    assert file.read_text().count("was not found anywhere any more.") == 40
    assert "Page was not found." not in file.read_text()  # below the fewest characters


def test_catalogues_in_binary_form_are_read_where_there_is_no_other(tool):
    (file,) = package_text("tool==1.0", "pl")
    assert file.read_text() == "Strony nigdzie nie znaleziono.\n"


@pytest.mark.parametrize(
    ("language", "code"), [("tr", "tr_TR"), ("es", "es_ES"), ("es-MX", "es_MX"), ("zh_hans", "zh_Hans")]
)
def test_a_language_is_found_by_its_own_code_or_its_only_or_own_regional_form(tool, language, code):
    assert package_text("tool==1.0", language)[0].stem == code


@pytest.mark.parametrize("language", ["zh", "sw"])
def test_a_language_that_is_not_there_is_refused_with_those_that_are(tool, language):
    with pytest.raises(ValueError, match=f"no sentences in '{language}'.*hu, pl, tr_TR, zh_Hans, zh_Hant"):
        package_text("tool==1.0", language)


def test_a_collection_takes_a_language_from_every_wheel_that_has_it(tool, index, monkeypatch):
    other = write_wheel(index, "other", {"other/locale/hu/LC_MESSAGES/other.po": catalogue("A lap", 9)})
    known(monkeypatch, tool)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    monkeypatch.setitem(TEXTS, "other", TextPackage("1.0", digest, "MIT", 1))
    monkeypatch.setitem(COLLECTIONS, "both", ("tool", "other"))
    assert [file.parent.name for file in package_text("both", "hu")] == ["tool-1.0", "other-1.0"]
    assert [file.parent.name for file in package_text("both", "pl")] == ["tool-1.0"]


def test_a_wheel_that_needs_another_python_is_taken_all_the_same(index):
    write_wheel(index, "later", {"later/locale/hu/LC_MESSAGES/x.po": catalogue("A lap", 9)}, python=">=9.9")
    assert len(package_text("later==1.0", "hu")) == 1


def test_text_that_is_there_is_used_without_pip_and_made_again_when_cleaning_changes(tool, monkeypatch):
    (file,) = package_text("tool==1.0", "hu")
    whole = file.read_text()
    file.write_text(whole[:-5])
    assert package_text("tool==1.0", "hu")[0].read_text() == whole
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
        package_text("tool==1.0", "tr")
    monkeypatch.setattr(module, "_CONVERTER", module._CONVERTER + 1)
    package_text("tool==1.0", "hu")
    assert json.loads((file.parent / "lit_llm_text.json").read_text())["converter"] == module._CONVERTER


def test_two_processes_at_once_give_one_folder(tool):
    code = "from lit_llm.data.package_text import package_text; print(package_text('tool==1.0', 'hu'))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0] and in_cache() == ["tool-1.0"]
    assert "".join(out + err for out, err in told).count("Fetching") == 1


def test_another_wheel_than_the_known_one_is_refused_with_both_hashes(tool, monkeypatch):
    known(monkeypatch, tool, digest="0" * 64)
    with pytest.raises(ValueError) as refused:
        package_text("tool", "hu")
    assert "0" * 64 in str(refused.value) and hashlib.sha256(tool.read_bytes()).hexdigest() in str(refused.value)
    assert in_cache() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unknown", "software, django.*unknown==VERSION"),
        ("--no-index==1.0", "form package-text:NAME"),
        ("software==1.0 --index-url x", "form package-text:NAME"),
        ("../tool==1.0", "form package-text:NAME"),
    ],
)
def test_names_that_are_none_are_refused_before_pip_sees_them(index, monkeypatch, text, words):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(ValueError, match=words):
        package_text(text, "hu")


def test_a_wheel_without_sentences_and_one_that_pip_cannot_get_are_refused(index):
    write_wheel(index, "labels", {"labels/locale/hu/LC_MESSAGES/x.po": b'msgid "Save"\nmsgstr "Ment"\n'})
    with pytest.raises(ValueError, match="holds no sentences"):
        package_text("labels==1.0", "hu")
    with pytest.raises(ValueError, match="No matching distribution found for absent==3.1(.|\n)*data.groups"):
        package_text("absent==3.1", "hu")
    assert in_cache() == []


@pytest.mark.download
def test_the_packaged_collection_has_prose_in_old_and_new_languages(monkeypatch):
    made = [(USERS_CACHE / "text" / f"{name}-{TEXTS[name].version}").is_dir() for name in COLLECTIONS["software"]]
    if not all(made) and os.environ.get("LIT_LLM_TEST_DOWNLOAD") != "1":
        pytest.skip("the text is not in the cache; LIT_LLM_TEST_DOWNLOAD=1 fetches it (61 MB)")
    monkeypatch.setenv("LIT_LLM_CACHE", str(USERS_CACHE))
    for language in ("en", "es", "fr", "de", "it", "hu", "tr", "pl", "fi"):
        lines = [line for file in package_text("software", language) for line in file.read_text().splitlines()]
        size = sum(len(line.encode()) for line in lines)
        assert size > 100_000 and size / len(lines) > 350
        assert not any(sign in line for line in lines for sign in ("%(", "%s", "{{", "msgid"))
    hungarian = " ".join(package_text("software", "hu")[0].read_text().split()[:2000])
    assert hungarian.count(" a ") > 50 and " the " not in hungarian
