"""From the fields of an example to the text of its prompt."""

from __future__ import annotations

from typing import Literal

Template = Literal["alpaca", "plain", "chat"]

_ALPACA = (
    "Below is an instruction that describes a task{context_clause}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{context_block}### Response:\n"
)


def render_prompt(tokenizer, template: Template, instruction: str, context: str = "", system: str | None = None) -> str:
    """The text that stands before the answer.

    Args:
        tokenizer: renders the `chat` template; the other two do not look at it.
        template: `alpaca` is the wording of the DSKD and MiniLLM data (arXiv 2406.17328); `plain` is the instruction,
            the context and a line break; `chat` is the tokenizer's own chat template with an opened answer.
        instruction: what is asked. With `plain` and no context it may be a finished prompt.
        context: material that the instruction speaks of; may be empty.
        system: system message, for `chat` only. None leaves it to the tokenizer's template.

    Raises:
        ValueError: `chat` with a tokenizer that has no chat template, or a system message without `chat`.
    """
    if system is not None and template != "chat":
        raise ValueError(
            f"data.system is set but data.template is {template!r}, which has no system message. Use chat."
        )
    if template == "alpaca":
        clause = ", paired with an input that provides further context" if context else ""
        block = f"### Input:\n{context}\n\n" if context else ""
        return _ALPACA.format(context_clause=clause, instruction=instruction, context_block=block)
    if template == "plain":
        return "\n".join(part for part in (instruction, context) if part) + "\n"
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": "\n".join(part for part in (instruction, context) if part)})
    return render_chat(tokenizer, messages)


def render_chat(tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation in the tokenizer's own chat template, with an opened answer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"data.template is 'chat', but the tokenizer of {tokenizer.name_or_path!r} has no chat template.\n"
            f"  Set data.template to alpaca or plain, or take an instruction-tuned model."
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
