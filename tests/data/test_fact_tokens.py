"""Prompts, answers and subjects in tokens, checked against the bytes that the tokens stand for."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llm.data.edit_requests import separator
from lit_llm.data.fact_tokens import FactText, encode_facts
from lit_llm.data.subjects import locate_subject
from lit_llm.data.vocabulary import token_spellings
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
FACTS = [  # language, prompt, subject, answer
    ("en", "The capital of France is", "France", "Rome"),
    ("ar", "عاصمة فرنسا هي", "فرنسا", "روما"),
    ("hi", "फ़्रांस की राजधानी", "फ़्रांस", "रोम"),
    ("th", "เมืองหลวงของฝรั่งเศสคือ", "ฝรั่งเศส", "โรม"),
    ("zh", "法国的首都是", "法国", "罗马"),
    ("ja", "フランスの首都は", "フランス", "ローマ"),
    ("ko", "프랑스의 수도는", "프랑스", "로마"),
    ("el", "Γαλλία, πρωτεύουσα:", "Γαλλία", "Ρώμη"),
    ("tr", "Diyarbakır'ın ülkesi", "Diyarbakır", "İtalya"),
    ("en", "Naïve 🙂 Café", "Café", "🙂🙂"),
    ("ru", "Франция", "Франция", "Рим"),
]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request):
    return byte_level_tokenizer() if request.param == "bytes" else sentencepiece_tokenizer()


def check_row(tokenizer, spellings, row, text):
    """The row against the bytes of its tokens: nothing here looks at offsets."""
    spelled = [spellings.bytes[token] or b"" for token in row.ids]
    dummy = len(b"".join(spelled)) - len(b"".join(spelled).removeprefix(b" " if not text.prompt[:1] == " " else b""))
    ends = [sum(map(len, spelled[: i + 1])) - dummy for i in range(len(spelled))]
    subject_end = len((text.prompt if text.subject_end is None else text.prompt[: text.subject_end]).encode())
    reached = next(i for i, end in enumerate(ends) if end >= subject_end)
    assert row.lookup == min(reached, row.prompt_length - 1)
    assert 0 <= row.lookup < row.prompt_length < len(row.ids)
    whole = b"".join(spelled)[dummy:].decode()
    between = separator(text.prompt, text.language)
    assert whole == text.prompt + between + text.answer
    assert row.crossed == (row.ids[: row.prompt_length] != row.prompt_ids)


@pytest.mark.parametrize(("language", "prompt", "subject", "answer"), FACTS)
def test_the_lookup_token_is_the_first_to_complete_the_subject_in_every_script(
    tokenizer, language, prompt, subject, answer
):
    text = FactText(language, prompt, answer, locate_subject(prompt, subject).end)
    (row,) = encode_facts(tokenizer, [text])
    check_row(tokenizer, token_spellings(tokenizer), row, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(alphabet="aé국は🙂ıİ x", min_size=1, max_size=8),
    st.text(alphabet="bß中ไท. ", max_size=8),
    st.text(alphabet="ab中🙂", min_size=1, max_size=5),
    st.sampled_from(["en", "zh", "th"]),
)
def test_any_text_is_split_at_its_bytes(subject, after, answer, language):
    for tokenizer in (byte_level_tokenizer(), sentencepiece_tokenizer()):
        prompt = "x" + subject + after
        text = FactText(language, prompt, answer, 1 + len(subject))
        (row,) = encode_facts(tokenizer, [text])
        check_row(tokenizer, token_spellings(tokenizer), row, text)


def test_without_a_subject_the_last_token_of_the_prompt_is_looked_up(tokenizer):
    (row,) = encode_facts(tokenizer, [FactText("en", "The capital is", "Rome")])
    assert row.lookup == row.prompt_length - 1


def test_several_texts_at_once_are_each_alone(tokenizer):
    texts = [FactText(language, prompt, answer, 2) for language, prompt, _, answer in FACTS]
    assert encode_facts(tokenizer, texts) == [encode_facts(tokenizer, [text])[0] for text in texts]
    assert encode_facts(tokenizer, []) == []


def merging(tokenizer):
    """A tokenizer of bytes that also merges "ab", whatever stands around it."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["ab"] = max(state["model"]["vocab"].values()) + 1
    state["model"]["merges"].insert(0, ["a", "b"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def test_where_a_merge_joins_prompt_and_answer_the_shared_beginning_is_the_prompt():
    tokenizer = merging(byte_level_tokenizer())
    (row,) = encode_facts(tokenizer, [FactText("zh", "1a", "b", subject_end=2)])
    assert [tokenizer.decode([token]) for token in row.ids] == ["1", "ab"]
    assert row.crossed and (row.prompt_length, row.lookup) == (1, 0)
    assert [tokenizer.decode([token]) for token in row.prompt_ids] == ["1", "a"]
    (spaced,) = encode_facts(tokenizer, [FactText("en", "1a", "b", subject_end=2)])
    assert not spaced.crossed and spaced.lookup == 1


def test_a_prompt_or_an_answer_without_tokens_of_its_own_is_refused():
    tokenizer = merging(byte_level_tokenizer())
    with pytest.raises(ValueError, match="The prompt 'a' has no token before the answer 'b'"):
        encode_facts(tokenizer, [FactText("zh", "a", "b")])


def test_what_the_tokenizer_puts_first_is_counted_and_nothing_is_put_last():
    from tokenizers.processors import TemplateProcessing

    tokenizer = sentencepiece_tokenizer()
    (plain,) = encode_facts(tokenizer, [FactText("en", "The capital of France is", "Rome", 21)])
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    (row,) = encode_facts(tokenizer, [FactText("en", "The capital of France is", "Rome", 21)])
    assert row.ids == (tokenizer.bos_token_id, *plain.ids)
    assert (row.lookup, row.prompt_length) == (plain.lookup + 1, plain.prompt_length + 1)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["gpt2", "mistral", "tinyllama", "smollm2"])
def test_published_tokenizers_are_read_right_too(name):
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data is not beside the checkout")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    texts = [
        FactText(language, prompt, answer, locate_subject(prompt, subject).end)
        for language, prompt, subject, answer in FACTS
    ]
    for row, text in zip(encode_facts(tokenizer, texts), texts, strict=True):
        check_row(tokenizer, token_spellings(tokenizer), row, text)
