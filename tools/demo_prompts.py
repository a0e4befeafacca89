"""The prompts of the demonstration data: `demo_prompts.yaml` spelled out, in the file's order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MATERIAL = Path(__file__).with_name("demo_prompts.yaml")


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt; `id` is its kind and its number within the kind, so it stays when other kinds change."""

    id: str
    kind: str
    prompt: str


def load_prompts(path: Path = MATERIAL) -> list[DemoPrompt]:
    """Every prompt of the material.

    Raises:
        ValueError: a kind lacks a template or a filler, a filler does not fit its template, or two prompts are equal.
    """
    import yaml

    kinds = yaml.safe_load(path.read_text())
    prompts = [prompt for kind, material in kinds.items() for prompt in _prompts_of(kind, material)]
    first: dict[str, str] = {}
    for prompt in prompts:
        if prompt.prompt in first:
            raise ValueError(
                f"{path.name}: {first[prompt.prompt]} and {prompt.id} are the same prompt: {prompt.prompt!r}. Change one."
            )
        first[prompt.prompt] = prompt.id
    return prompts


def _prompts_of(kind: str, material: dict) -> list[DemoPrompt]:
    templates = material.get("ask") or []
    fillers = [" ".join(filler.split()) for filler in (material.get("about") or "").split("|")]
    if not templates or not all(fillers):
        raise ValueError(
            f"{MATERIAL.name}: {kind} has {len(templates)} templates and an empty filler among {len(fillers)}. "
            f"Give at least one template under `ask` and fillers, separated by |, under `about`."
        )
    return [
        DemoPrompt(f"{kind}-{number:02d}", kind, _fill(templates[number % len(templates)], filler, kind))
        for number, filler in enumerate(fillers)
    ]


def _fill(template: str, filler: str, kind: str) -> str:
    first, equals, second = filler.partition(" = ")
    if bool(equals) != ("{a}" in template):
        raise ValueError(
            f"{MATERIAL.name}: in {kind} the filler {filler!r} does not fit the template {template!r}. "
            f'Templates with {{a}} and {{b}} take "a = b", templates with {{x}} take plain text.'
        )
    return template.format(a=first, b=second) if equals else template.format(x=filler)
