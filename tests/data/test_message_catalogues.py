"""From message catalogues to passages."""

import struct

import pytest

from lit_llm.data.message_catalogues import Message, passages, read_mo, read_po, sentences

PO = r"""# Translators:
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#: admin/actions.py:12 admin/views.py:3
msgctxt "button"
msgid "The page could not be found."
msgstr "Az oldal nem "
"található.\n"
"Új \"sor\"."

#. A remark
#: admin/actions.py:40
#, python-format, fuzzy
#| msgid "older"
msgid "A fuzzy one is not right."
msgstr "Ez nem jó."

#: forms.py:1
msgid "Not translated yet."
msgstr ""
msgid "No blank line before it."
msgstr "Nincs előtte üres sor."

#, python-format
msgid "%d page was deleted."
msgid_plural "%d pages were deleted."
msgstr[0] "%d oldal törölve."
msgstr[1] "%d oldal törölve."

#~ msgid "An obsolete one is gone."
#~ msgstr "Ez már nincs."
"""


def write_mo(pairs: dict[str, str], order: str = "<") -> bytes:
    """As msgfmt writes it, without its hash table."""
    rows = [[text.encode() for text in pair] for pair in sorted(pairs.items())]
    tables, offset, body = [], 28 + 16 * len(rows), b""
    for side in (0, 1):
        for row in rows:
            tables.append((len(row[side]), offset + len(body)))
            body += row[side] + b"\x00"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    return head + b"".join(struct.pack(f"{order}2I", *entry) for entry in tables) + body


def test_a_po_file_gives_its_messages_in_order_without_fuzzy_obsolete_and_plural_ones():
    assert read_po(PO) == [
        Message("The page could not be found.", 'Az oldal nem található.\nÚj "sor".', "admin/actions.py"),
        Message("Not translated yet.", "", "forms.py"),
        Message("No blank line before it.", "Nincs előtte üres sor.", ""),
    ]


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_mo_file_gives_the_same_messages_without_header_contexts_and_plurals(order):
    content = write_mo({"": "Content-Type: x", "b\x04One.": "Egy.", "%d\x00%ds": "%d\x00%d", "Two.": "Kettő."}, order)
    assert read_mo(content) == [Message("Two.", "Kettő."), Message("One.", "Egy.")]


def test_another_file_is_no_mo_file():
    with pytest.raises(ValueError, match="not a .mo file"):
        read_mo(b"PK\x03\x04" + bytes(40))


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Az oldal nem található.", "Az oldal nem található."),
        ("<p>Kérjük,\n  <b>mentse</b> el&nbsp;a munkáját!</p>", "Kérjük, mentse el a munkáját!"),
        ('Nyomja meg a "Mentés" gombot.', 'Nyomja meg a "Mentés" gombot.'),
        ("ページが見つかりませんでした。", "ページが見つかりませんでした。"),
        ("इस फ़ाइल को हटाया नहीं जा सकता है।", "इस फ़ाइल को हटाया नहीं जा सकता है।"),
        ("Az oldal nem található", None),  # a label
        ("Nem jó.", None),
        ("A %(name)s nem található itt.", None),
        ("A(z) %s nem található itt már.", None),
        ("A {name} nem található itt már.", None),
        ("A {{ name }} nem található itt már.", None),
        ("A ${name} nem található itt már.", None),
        ("1.2.3.4, 5.6.7.8 és 10.20.30.40/24 (-:1).", None),
        ("A munka 100%-a kész van mára.", "A munka 100%-a kész van mára."),
    ],
)
def test_only_finished_sentences_without_placeholders_are_prose(text, prose):
    assert sentences(text) == prose


def test_passages_end_at_their_length_and_where_the_place_changes_after_a_third_of_it():
    texts = [("a", "1" * 20), ("a", "2" * 20), ("b", "3" * 20), ("b", "4" * 50), ("c", "5")]
    made = passages(texts, length=60)
    assert made == ["1" * 20 + " " + "2" * 20, "3" * 20 + " " + "4" * 50, "5"]
    assert passages([], length=60) == []
