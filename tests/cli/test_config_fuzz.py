"""Shipped configs with keys and types changed at random: a message that can be read, or a config that parses."""

import copy
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llm.cli import main
from tests.cli.parsing import RECIPES, stop_before_the_run

SHIPPED = [yaml.safe_load(path.read_text()) for path in RECIPES]
ODD_TEXT = [
    "",
    " ",
    "null",
    "stage:x",
    "${vars.x}",
    "${",
    "$",
    "../..",
    "~",
    "-1",
    "1e999",
    "\u202e",
    "package:",
    "a" * 300,
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(ODD_TEXT),
    st.text(max_size=6),
    st.lists(st.one_of(st.none(), st.integers(-2, 2), st.text(max_size=2)), max_size=2),
    st.dictionaries(
        st.sampled_from(["class_path", "init_args", "source", "a", ""]), st.integers() | st.text(max_size=3), max_size=2
    ),
)
KEYS = st.sampled_from(["", " ", "a.b", "lr", "init_args", "class_path", "0", "$", "--x", "é"])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder of its own to be in, without a package index, in which no run begins."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        stop_before_the_run(patch)
        os.chdir(folder)
        yield folder
        os.chdir(before)


def places(config, path: tuple = ()) -> list[tuple]:
    """Where something can be changed: the keys that lead to every node but the root."""
    found = [path] if path else []
    for key, value in config.items() if isinstance(config, dict) else ():
        found += places(value, (*path, key))
    return found


@st.composite
def changed_configs(draw) -> dict:
    config = copy.deepcopy(draw(st.sampled_from(SHIPPED)))
    config["trainer"]["accelerator"] = "cpu"
    for _ in range(draw(st.integers(1, 3))):
        known = places(config)
        if not known:
            break
        *above, last = draw(st.sampled_from(known))
        node = config
        for key in above:
            node = node[key]
        how = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "add"]))
        if how == "value":
            node[last] = draw(ODD)
        elif how == "add":
            node[draw(KEYS)] = draw(ODD)
        else:
            value = node.pop(last)
            if how == "rename":
                node[draw(KEYS)] = value
    return config


@settings(max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=changed_configs())
def test_a_changed_config_is_refused_in_words_or_parses(config, elsewhere):
    file = elsewhere / "changed.yaml"
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            main(["fit", "--config", str(file)])
        except SystemExit as stop:
            assert stop.code in (1, 2)
            assert said.getvalue().count("\nlit_llm fit: ") == 1
            assert len(said.getvalue().rpartition("\nlit_llm fit: ")[2].split("(LIT_LLM_TRACEBACK")[0].strip()) > 10
    assert "Traceback" not in said.getvalue()
