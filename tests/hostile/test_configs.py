"""Hostile adapter configs: expressions that may never end, and fields that are none."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfrom import merge
from fedfrom.merging.peft.configs import check_config, rank_and_scaling
from tests.hostile.given import FILE_STATE, refused
from tests.hostile.oracle import scaling_of
from tests.hostile.values import BOMB, CONFIG, PATHS, V, cases
from tests.hostile.watch import harmless

pytestmark = pytest.mark.timeout(6 * 3600)  # thousands of cases, on a machine that has other work
NO_EXPRESSIONS = ["(", "a{99999999999}", "(" * 3000 + ")" * 3000, "*", "(?i)V"]


BOMBS = [BOMB, "(a+)+$", "(.*)*X", "(a|a)" * 40 + "X", ".*" * 30 + "X", "a?" * 40 + "a" * 40, "(?:.|.)+X"]
BOMBS += [r"(?:\w|\.){5,}X", r"[\]]*[a-z]*.*.+\w+X", "(a|b|(c|d)){2}"]


@pytest.mark.parametrize("pattern", [*BOMBS, *NO_EXPRESSIONS])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_expressions_that_may_never_end_are_refused(pattern: str, field: str) -> None:
    configs = [CONFIG, {**CONFIG, field: {pattern: 4}}]
    refused("client 1", field, "regular expressions", states=[FILE_STATE] * 2, configs=configs)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj",
        r"model\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(q|k|v|o)_proj",
        r"^encoder\.layer\.[0-9]+\.attention\.self\.(query|value)$",
        r"(.*\.)?v",
        "a)?(.*v",
        r"layers\.\d{1,2}\.v",
    ],
)
def test_expressions_that_people_write_are_taken(pattern: str) -> None:
    config = {**CONFIG, "alpha_pattern": {pattern: 2}}
    found = rank_and_scaling(check_config(config, "client 0"), V)
    assert found == (4, scaling_of(config)(V))


@cases(50)
@given(
    pattern=st.text("ab.-é_", min_size=1, max_size=5),
    module=st.lists(st.text("abé-_", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join),
)
def test_names_match_as_the_expressions_that_they_are(pattern: str, module: str) -> None:
    config = {**CONFIG, "alpha_pattern": {pattern: 3}}
    expected = 3 if re.match(rf"(.*\.)?({pattern})$", module) else CONFIG["lora_alpha"]
    assert rank_and_scaling(config, module)[1] * 4 == expected


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": 10**400}, " r "),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": {3: 4}}, "rank_pattern"),
        ({"peft_type": "LO\nRA"}, "peft_type"),
    ],
)
def test_configs_that_are_none(changes: dict[str, Any], word: str) -> None:
    message = refused("client 1", word, states=[FILE_STATE] * 2, configs=[CONFIG, {**CONFIG, **changes}])
    assert message.isprintable()


@pytest.mark.parametrize("path", PATHS)
def test_paths_in_adapter_configs_are_never_followed(path: str) -> None:
    fields = ("base_model_name_or_path", "path_initial_model_for_weight_conversion", "parent_library", "revision")
    config = {**CONFIG, **dict.fromkeys(fields, path), "auto_mapping": {"base_model_class": path}}
    with harmless():
        _, report = merge([FILE_STATE, FILE_STATE], configs=[config, config])
    assert report.config is not None and report.config["base_model_name_or_path"] == path  # text, as it came
