"""A config keeps its values through JSON and names the field that is wrong."""

import json
from typing import Any

import numpy as np
import pytest

from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError
from equipot.model.potential import Potential
from equipot.model.references import References

MINIMAL: dict[str, Any] = {"elements": (1, 8), "levels_of_theory": ("PBE",)}


def test_json_round_trip() -> None:
    config = ModelConfig(
        **MINIMAL, width=96, forces="direct", charges=(-1, 0, 1), cutoff=4, mean_neighbors=31.4
    )
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("words", ["balanced", ("lean", "fast", "split"), ["lean", "fast", "split"]])
def test_messages_are_one_word_or_one_for_each_layer(words: Any) -> None:
    config = ModelConfig(**MINIMAL, layers=3, messages=words)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.message_forms == (("balanced",) * 3 if words == "balanced" else ("lean", "fast", "split"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("width", 1),
        ("width", True),
        ("width", 12.5),
        ("layers", 0),
        ("radial", -1),
        ("cutoff", 0),
        ("cutoff", float("nan")),
        ("cutoff", float("inf")),
        ("cutoff", "5"),
        ("mean_neighbors", 0.0),
        ("forces", "gradient"),
        ("normalisation", "batch"),
        ("messages", "quick"),
        ("messages", 3),
        ("messages", ("fast", "lean")),
        ("messages", ("fast", "lean", "quick")),
        ("messages", ()),
        ("residual", "yes"),
        ("architecture", ""),
        ("elements", ()),
        ("elements", (8, 1)),
        ("elements", (1, 1)),
        ("elements", (0, 1)),
        ("elements", (1, 119)),
        ("elements", "HO"),
        ("elements", 8),
        ("levels_of_theory", ()),
        ("levels_of_theory", ("PBE", "PBE")),
        ("levels_of_theory", ("",)),
        ("charges", (0.5,)),
        ("spin_multiplicities", (-1,)),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=field):
        ModelConfig.from_json(MINIMAL | {field: value})


def test_missing_and_unknown_fields_are_named() -> None:
    with pytest.raises(ModelError, match="'elements' is missing"):
        ModelConfig.from_json({"levels_of_theory": ["PBE"]})
    with pytest.raises(ModelError, match="unknown field 'widht'"):
        ModelConfig.from_json(MINIMAL | {"widht": 64})


def test_an_unknown_architecture_names_those_there_are() -> None:
    config = ModelConfig(**MINIMAL, architecture="gcn")
    with pytest.raises(ModelError, match="'gcn'; choose one of egnn"):
        Potential(config, References(energy=np.zeros((1, 2)), scale=np.ones(1)))


def test_references_round_trip_bit_for_bit() -> None:
    references = References(energy=np.array([[-13.6057, 1 / 3]]), scale=np.array([0.1]))
    back = References.from_json(json.loads(json.dumps(references.to_json())))
    assert (back.energy == references.energy).all()
    assert (back.scale == references.scale).all()


@pytest.mark.parametrize(
    ("energy", "scale"),
    [
        ([1.0, 2.0], [1.0]),
        ([[1.0, 2.0]], [1.0, 1.0]),
        ([[1.0, np.nan]], [1.0]),
        ([[1.0, 2.0]], [0.0]),
        ([[1.0, 2.0]], [np.inf]),
    ],
)
def test_malformed_references(energy: Any, scale: Any) -> None:
    with pytest.raises(ModelError, match="references"):
        References(energy=energy, scale=scale)


def test_references_for_other_elements_are_refused() -> None:
    with pytest.raises(ModelError, match="2 elements"):
        Potential(ModelConfig(**MINIMAL), References(energy=np.zeros((1, 3)), scale=np.ones(1)))
