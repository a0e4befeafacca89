"""What went wrong with a call, in a line or two: jsonargparse's trees of failed types reduced to the thing that is meant.

jsonargparse tells an error with all types that a value might have had, and with the whole config around it. Here the branch
that matters is kept, with the full name of the key, the value, and where the right ones are listed.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
import typing
from argparse import ArgumentError
from dataclasses import dataclass, field
from pydoc import locate

_UNION = "Does not validate against any of the Union subtypes"
_NOTHING = re.compile(r"^Expected a (<class 'NoneType'>|None)\.?( Got value: .*)?$")
_TYPE = re.compile(r"^Expected an? (?P<type>.+?)(\. Got value: (?P<value>.*))?$", re.DOTALL)
_UNKNOWN = (
    re.compile(r"^Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"^[Uu]nrecognized arguments: (?P<key>\S+)"),
    re.compile(r"^Key '(?P<key>[^']+)' is not expected"),
    re.compile(r"^No action for key \"(?P<key>[^\"]+)\""),
)
_REQUIRED = re.compile(r"^the following arguments are required: (?P<names>.*)$")
_INTERPOLATION = re.compile(r"Interpolation key '(?P<key>[^']+)' not found[^\n]*(\n\s*full_key: (?P<at>\S+))?")
_GROUP = re.compile(r"^(Subcommand|Group) '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>.*)$")
_TOP = (
    "seed_everything",
    "model",
    "data",
    "trainer",
    "checkpoint",
    "run",
    "stages",
    "vars",
    "compile_loss",
    "non_finite",
    "ckpt_path",
)


def readable(error: Exception, command: str) -> str:
    """The message of an error that a call or a config has caused.

    Args:
        error: what was raised.
        command: that was called; names where its settings are listed.
    """
    text = str(error).strip() or type(error).__name__
    if match := _REQUIRED.match(text):
        names = ", ".join(f"--{name.removeprefix(f'{command}.')}" for name in match["names"].split(", "))
        return f"Not given: {names}.\n  python -m lit_llm {command} --help says what it is."
    if match := _INTERPOLATION.search(text):
        where = f"{match['at'].removeprefix(f'{command}.')} refers to" if match["at"] else "The config refers to"
        name = match["key"].lstrip(".").removeprefix(f"{command}.")
        return f"{where} ${{{name}}}, which no config has.\n  Write it there, or correct the name."
    if type(error).__module__.startswith("omegaconf."):
        first, _, rest = text.partition("\n")
        at = re.search(r"full_key: (\S+)", rest)
        return f"{at[1].removeprefix(f'{command}.') if at else 'The config'}: {first}.\n  Correct what stands between ${{ and }}."
    if not (_is_of_jsonargparse(text) or isinstance(error, ArgumentError)):
        return text
    found = _reduced(text, _Place())
    of_parsing = found.is_ours or isinstance(error, ArgumentError)
    return f"{found.text}\n  {found.place.way_out(command)}" if of_parsing else found.text


def lost_process(error: Exception) -> str | None:
    """What to say where a collective operation failed, because another process of the run has gone or has stopped.

    Returns:
        None: the error is another one.
    """
    kind, text = type(error), str(error)
    if not kind.__name__.startswith("Dist") and not (kind is RuntimeError and ("gloo" in text or "NCCL" in text)):
        return None
    first = text.split("\n")[0][:200]
    what = "has not answered in time" if "imed out" in text else "of this run has gone"
    return (
        f"Another process {what} ({first}).\n  What it said itself stands above, or in the output of its machine. Start all "
        f"processes again with --ckpt_path last. How long one waits for another: "
        f"trainer.strategy.init_args.timeout of DDPStrategy."
    )


@dataclass
class _Place:
    """Where in the config: dotted keys, and the classes that the last ones belong to."""

    keys: tuple[str, ...] = ()
    class_path: str | None = None
    below_class: tuple[str, ...] = ()

    def at(self, key: str) -> _Place:
        parts = tuple(key.split("."))
        if self.class_path is None:
            return _Place(self.keys + parts)
        return _Place(self.keys + parts, self.class_path, self.below_class + parts)

    def of(self, class_path: str) -> _Place:
        nested = ("init_args",) if self.keys[:1] != ("stages",) else ()
        return _Place(self.keys + nested, class_path)

    @property
    def name(self) -> str:
        return ".".join(self.keys)

    def names(self) -> list[str]:
        """Of the settings that may stand here."""
        if self.class_path is not None:
            return _settings(locate(self.class_path), self.below_class)
        if self.keys == ("trainer",):
            return _settings(locate("lightning.pytorch.Trainer"), ())
        if self.keys == ("checkpoint",):
            return _settings(locate("lightning.pytorch.callbacks.ModelCheckpoint"), ())
        if self.keys == ("run",):
            return ["root", "name", "version"]
        if self.keys == ("non_finite",):
            return ["action", "most"]
        return list(_TOP) if not self.keys else []

    def way_out(self, command: str) -> str:
        if self.class_path is not None and self.keys[0] in ("model", "data"):
            short = self.class_path.rpartition(".")[2]
            return f"Its settings: python -m lit_llm {command} --{self.keys[0]}.help {short}"
        return f"All settings: python -m lit_llm {command} --help"


@dataclass
class _Found:
    """A message, where it belongs, and whether we have written it from jsonargparse's words."""

    text: str
    place: _Place = field(default_factory=_Place)
    is_ours: bool = True


def _is_of_jsonargparse(text: str) -> bool:
    begins = (_UNION, 'Parser key "', "Problem with given class_path", "Expected a")
    return text.startswith(begins) or any(pattern.match(text) for pattern in (*_UNKNOWN, _GROUP))


def _reduced(text: str, place: _Place) -> _Found:
    """Follow the tree to the branch that says most."""
    first, _, rest = text.strip("\n").partition("\n")
    first, rest = first.strip(), textwrap.dedent(rest)
    if match := re.match(r"^Parser key \"(?P<key>[^\"]+)\":$", first):
        return _reduced(rest, place.at(match["key"]))
    if match := re.match(r"^Problem with given class_path '(?P<path>[^']+)':$", first):
        return _reduced(rest, place.of(match["path"]))
    if first == _UNION:
        return _best_of_union(rest, place)
    if first.startswith("- "):  # what a file of that name, and then the value itself, was wrong for
        last = [part for part in re.split(r"(?m)^- ", text.strip("\n")) if part][-1]
        return _reduced(textwrap.dedent(f"  {last}"), place)
    if match := re.match(r"^Not a valid subclass of (?P<kind>\w+)(\. Got value: (?P<value>.*))?$", first):
        given = "" if match["value"] is None else f", but it is {_shown(match['value'])}"
        return _Found(f"{place.name} must be the settings of a {match['kind']}{given}.", place)
    if match := _NO_CLASS.match(first):
        return _Found(_no_class(match["name"], place), place)
    if match := _GROUP.match(first):
        return _unknown(match["key"], place.at(match["group"]) if first.startswith("Group") else place)
    for pattern in _UNKNOWN:
        if match := pattern.match(first):
            return _unknown(match["key"], place)
    if match := _TYPE.match(first):
        given = "" if match["value"] is None else f", but it is {_shown(match['value'])}"
        return _Found(f"{place.name} must be {_type_name(match['type'])}{given}.", place)
    whole = text.strip("\n")
    return _Found(whole if not place.keys or place.name in whole else f"{place.name}: {whole}", place, is_ours=False)


def _best_of_union(rest: str, place: _Place) -> _Found:
    branches, given = _branches(rest)
    branches = [branch for branch in branches if not _NOTHING.match(branch.strip())]
    telling = [branch for branch in branches if not _TYPE.match(branch.strip()) or _NO_CLASS.match(branch.strip())]
    if telling:
        return _reduced(telling[0], place)
    types = [_type_name(_TYPE.match(branch.strip())["type"]) for branch in branches] or ["null"]
    return _Found(f"{place.name or 'A value'} must be {' or '.join(types)}, but it is {_shown(given)}.", place)


def _branches(rest: str) -> tuple[list[str], str]:
    """The bullets under `Errors:`, and the value that was given."""
    _, _, after = rest.partition("Errors:\n")
    bullets, _, value = after.rpartition("\nGiven value type:")
    parts = re.split(r"(?m)^  - ", "\n" + (bullets or after))[1:]
    return [textwrap.dedent(f"    {part}").rstrip() for part in parts], value.partition("Given value: ")[2].strip()


def _unknown(key: str, place: _Place) -> _Found:
    *parents, name = key.lstrip("-").partition("=")[0].split(".")
    if parents and not place.keys and parents[0] not in _TOP:
        parents, name = [], parents[0]
    if parents:
        place = place.at(".".join(parents))
    known = place.names()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    whole = ".".join((*place.keys, name))
    owner = f" of {place.class_path.rpartition('.')[2]}" if place.class_path is not None else ""
    return _Found(f"{whole} is no setting{owner}.{hint}", place)


def _no_class(name: str, place: _Place) -> str:
    known = _classes(place.keys)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    listed = f" There are: {', '.join(known)}." if known else ""
    return f"{place.name}.class_path names {name!r}, which is no class here.{hint}{listed}"


def _classes(keys: tuple[str, ...]) -> list[str]:
    """Short names of what may stand at `model` or `data`."""
    from lit_llm import methods
    from lit_llm.methods.base import _LEARNED_FROM

    if keys == ("data",):
        return sorted(known.__name__ for known in _LEARNED_FROM)
    return sorted(methods.__all__) if keys == ("model",) else []


def _settings(kind: typing.Any, path: tuple[str, ...]) -> list[str]:
    """Names of the constructor's arguments, of the dataclass that a dotted path leads to."""
    if kind is None:
        return []
    if not path:
        return [name for name in inspect.signature(kind).parameters if name != "self"]
    try:
        hint = typing.get_type_hints(kind.__init__).get(path[0])
    except NameError:  # a type that only a type checker imports
        return []
    inner = next((part for part in (hint, *typing.get_args(hint)) if hasattr(part, "__dataclass_fields__")), None)
    return _settings(inner, path[1:])


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", text)
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "dict": "a mapping"}
    return words.get(text, {"list": "a list", "NoneType": "null"}.get(text, text.replace("typing.", "")))


def _shown(value: str) -> str:
    """The value as given, shortened."""
    value = value.strip()
    if match := re.match(r"^NestedArg\(key='(?P<key>[^']*)', val=(?P<val>.*)\)$", value):
        value = match["val"].strip("'")
    return repr(value) if len(value) <= 120 else repr(value[:120]) + " ..."
