"""Prompts with checkable constraints: `preference_prompts.yaml` spelled out and dealt to the parts by topic."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.evaluation.constraints import validate

MATERIAL = Path(__file__).with_name("preference_prompts.yaml")
_SHARES = {1: 0.1, 2: 0.45, 3: 0.45}  # of prompts with so many checks
_NO_ARTICLE = ("food", "weather")  # categories whose names stand without an article, or bring their own


@dataclass(frozen=True)
class PreferencePrompt:
    """One prompt.

    Attributes:
        id: topic and task.
        topic: what it is about.
        prompt: the text, constraints included.
        checks: the same constraints as data.
    """

    id: str
    topic: str
    prompt: str
    checks: list[dict[str, Any]]


def load_material(path: Path = MATERIAL) -> dict[str, Any]:
    """The material with its lists spelled out.

    Raises:
        ValueError: a name is empty, a topic stands twice, or a task asks for a family of checks that does not exist.
    """
    import yaml

    material = yaml.safe_load(path.read_text())
    for entry in [*material["topics"].values(), *material["tasks"].values()]:
        for field in ("names", "use", "avoid", "allow", "needs"):
            if field in entry:
                entry[field] = [" ".join(part.split()) for part in entry[field].split("|")]
                if not all(entry[field]):
                    raise ValueError(f"{path.name}: an empty part under `{field}`. Remove the extra |.")
    topics = [name for category in material["topics"].values() for name in category["names"]]
    if twice := sorted({name for name in topics if topics.count(name) > 1}):
        raise ValueError(f"{path.name}: topics that stand twice: {', '.join(twice)}. Remove one of each.")
    for name, task in material["tasks"].items():
        unknown = set(task["allow"] + task.get("needs", [])) - set(material["checks"])
        if unknown:
            raise ValueError(f"{path.name}: the task {name} names unknown families of checks: {sorted(unknown)}.")
    return material


def deal_topics(material: dict[str, Any], shares: dict[str, float], seed: int) -> dict[str, list[tuple[str, str]]]:
    """(category, topic) of each part, by its share; each category is dealt on its own, so that all parts have them all."""
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in shares}
    for category, entry in material["topics"].items():
        names = list(entry["names"])
        random.Random(f"{seed} {category}").shuffle(names)
        total, start, sum_so_far = sum(shares.values()), 0, 0.0
        for part, share in shares.items():
            sum_so_far += share
            end = round(len(names) * sum_so_far / total)
            parts[part] += [(category, name) for name in names[start:end]]
            start = end
    return parts


def make_prompts(
    material: dict[str, Any], topics: list[tuple[str, str]], number: int, seed: int
) -> list[PreferencePrompt]:
    """So many different prompts about the topics, which take turns.

    Raises:
        ValueError: more prompts than topics times tasks.
    """
    if number > len(topics) * len(material["tasks"]):
        raise ValueError(f"{number} prompts from {len(topics)} topics and {len(material['tasks'])} tasks. Add topics.")
    made = []
    tasks_of = {}
    for category, topic in topics:
        tasks_of[topic] = list(material["tasks"])
        random.Random(f"{seed} {topic}").shuffle(tasks_of[topic])
    for turn in range(len(material["tasks"])):
        for category, topic in topics:
            if len(made) < number:
                made.append(_prompt(material, category, topic, tasks_of[topic][turn], seed))
    return made


def _prompt(material: dict[str, Any], category: str, topic: str, name: str, seed: int) -> PreferencePrompt:
    """One prompt, made of nothing but its own generator, so that it stays when others change."""
    generator = random.Random(f"{seed} {topic} {name}")
    task, words = material["tasks"][name], material["topics"][category]
    wanted = generator.choices(list(_SHARES), list(_SHARES.values()))[0]
    needed = task.get("needs", [])
    allowed = [family for family in task["allow"] if family not in needed]
    families = needed + generator.sample(allowed, min(max(wanted - len(needed), 0), len(allowed)))
    if "language" in families:  # an English word to use, or to begin with, would contradict it
        families = [family for family in families if family not in ("words", "start")]
    chosen: list[tuple[str, dict[str, Any]]] = []
    for family in families:
        taken = [check["kind"] for _, check in chosen]
        entries = [entry for entry in material["checks"][family] if entry["kind"] not in taken]
        if entries:
            chosen.append(_check(generator.choice(entries), words, topic, generator))
    article = "" if category in _NO_ARTICLE else "an " if topic[0] in "aeiou" else "a "
    sentences = [generator.choice(task["ask"]).format(x=article + topic), *(text for text, _ in chosen)]
    checks = [check for _, check in chosen]
    validate(checks)
    return PreferencePrompt(f"{topic.replace(' ', '-')}-{name}", topic, " ".join(sentences), checks)


def _check(entry: dict[str, Any], words: dict, topic: str, generator: random.Random) -> tuple[str, dict[str, Any]]:
    """The sentence that states a check, and the check."""
    kind, ask = entry["kind"], generator.choice(entry["ask"])
    if kind in ("include", "avoid"):
        pool = [word for word in words["use" if kind == "include" else "avoid"] if word != topic]
        chosen = generator.sample(pool, entry["words"])
        return ask.format(words='" and "'.join(chosen)), {"kind": kind, "words": chosen}
    fields = {name: generator.choice(values) for name, values in entry.items() if name not in ("kind", "ask")}
    if kind == "between_words":
        low, high = fields["value"]
        return ask.format(low=low, high=high), {"kind": kind, "low": low, "high": high}
    return ask.format(**fields), {"kind": kind, **fields}
