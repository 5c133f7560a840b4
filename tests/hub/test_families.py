"""The tables themselves: what is published is understood, and what is written says what was meant."""

import pytest

from moeforge.hub.families import FAMILIES
from moeforge.hub.families.family import differences
from moeforge.hub.families.rows import At, Joint, Only
from moeforge.models import measure
from tests.hub.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood_and_comes_back(name):
    config_json, total = PUBLISHED[name]
    family = FAMILIES[config_json["model_type"]]
    config = family.read(config_json)
    assert measure(config).total.all == total
    assert family.write(config, config_json) == {"architectures": [family.architecture], **config_json}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_made_from_nothing_says_the_same(name):
    config_json, _ = PUBLISHED[name]
    family = FAMILIES[config_json["model_type"]]
    config = family.read(config_json)
    assert differences(config, family.read(family.write(config))) == []


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_field_has_one_row(family):
    fields = [name for row in family.rows for name in row.defaults]
    assert len(fields) == len({*fields}) and not family.inert & {*fields}
    assert all(isinstance(row, At | Only | Joint) for row in family.rows)


def test_two_names_of_one_field_must_agree():
    row = At("k", 8, "moe.router.select.k", also="top")
    assert row.read({"k": 8, "top": 2}) == row.read({"k": 2, "top": 2}) == {"moe.router.select.k": 2}
    with pytest.raises(ValueError, match="k is 4 and top is 2"):
        row.read({"k": 4, "top": 2})
