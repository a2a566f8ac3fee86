"""Whatever a configuration holds, at whatever field: it is read as plain data or refused in one line, and no module is
imported for it."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashbone.compare.config import ComparedData, ComparisonConfig, load_comparison
from flashbone.errors import FlashboneError
from flashbone.train.recipe import DataRecipe, Quantization, Recipe, RwkvSettings, load_adapter_fields, load_recipe

MODULE = "a_module_that_nothing_may_import"
TRAP = f"{MODULE}.Thing"
SECTIONS = {
    "adapter": ["r", "variant", "target_modules", "rank_pattern", "modules_to_save", "layers_to_transform"],
    "training": ["run_name", "max_steps", "learning_rate", "lr_scheduler_kwargs", "model_init_kwargs", "report_to"],
    "data": list(DataRecipe.__dataclass_fields__),
    "quantization": list(Quantization.__dataclass_fields__),
    "rwkv": list(RwkvSettings.__dataclass_fields__),
}
READERS = {
    "recipe": (
        load_recipe,
        [*Recipe.__dataclass_fields__, *(f"{a}.{b}" for a, names in SECTIONS.items() for b in names)],
    ),
    "adapter": (load_adapter_fields, ["adapter", *(f"adapter.{name}" for name in SECTIONS["adapter"])]),
    "comparison": (
        load_comparison,
        [
            *ComparisonConfig.__dataclass_fields__,
            *(f"data.{name}" for name in ComparedData.__dataclass_fields__),
            *(f"training.{name}" for name in SECTIONS["training"]),
        ],
    ),
}

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([TRAP, MODULE, f"@{MODULE}"]),
)
names = st.sampled_from(["class_path", "init_args", "dict_kwargs", "__class__", "_target_", "path", "method", TRAP])
structures = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=3)
)
attacks = st.one_of(
    structures,
    structures.map(lambda value: {"class_path": TRAP, "init_args": value}),
    structures.map(lambda value: [{"class_path": TRAP, "init_args": {"x": value}}]),
    st.sampled_from(
        [
            f"{{class_path: {TRAP}}}",
            f"class_path: {TRAP}",
            f"[{{class_path: {TRAP}, init_args: {{}}}}]",
            f"!!python/object:{TRAP} {{}}",
            f"!!python/name:{TRAP}",
            f"!!python/module:{MODULE}",
            f"'{{class_path: {TRAP}}}'",
            json.dumps(json.dumps({"class_path": TRAP})),
        ]
    ),
)


@pytest.fixture(scope="module", autouse=True)
def trap(tmp_path_factory):
    """A module that can be imported, in the current folder beside files that hold its name."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / f"{MODULE}.py").write_text("class Thing:\n    pass\n")
    for name in ("evil.yaml", "evil.json"):
        (folder / name).write_text(json.dumps({"class_path": TRAP}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        yield folder
    assert MODULE not in sys.modules


def is_plain_or_one_line(reader: str, folder: Path, content: object, flags: list[str]) -> bool:
    """Whether a configuration is read, or refused by an error of ours in one line, and nothing is imported."""
    load, _ = READERS[reader]
    file = folder / "c.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True))
    said = ""
    try:
        load(file, flags)
    except FlashboneError as error:
        said = str(error)
    return "\n" not in said and MODULE not in sys.modules


def base() -> dict:
    return {"model": "m", "output": "o", "data": {"path": "p", "test": 1}}


@pytest.mark.parametrize("reader", READERS)
def test_no_field_makes_an_object_of_a_class_that_it_names(reader, trap):
    start = base() if reader == "comparison" else {"model": "m", "output": "o", "data": {"path": "p"}}
    for field in READERS[reader][1]:
        assert is_plain_or_one_line(
            reader, trap, start, [f"--{field}.class_path={TRAP}", f"--{field}.init_args.x", "1"]
        )
        for value in (
            {"class_path": TRAP},
            f"{{class_path: {TRAP}}}",
            [{"class_path": TRAP}],
            "evil.yaml",
            "@evil.yaml",
        ):
            assert is_plain_or_one_line(
                reader, trap, start, [f"--{field}", value if isinstance(value, str) else json.dumps(value)]
            )
            outer, _, inner = field.partition(".")
            assert is_plain_or_one_line(reader, trap, start | {outer: {inner: value} if inner else value}, [])


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_fields_are_plain_data_or_one_line(reader, trap, data):
    field = data.draw(st.sampled_from(READERS[reader][1]))
    value = data.draw(attacks)
    content, (outer, _, inner) = base(), field.partition(".")
    if reader != "comparison":
        content["data"].pop("test")
    as_flag = data.draw(st.booleans())
    flags = []
    if as_flag:
        text = value if isinstance(value, str) else json.dumps(value)
        flags = data.draw(
            st.sampled_from([[f"--{field}", text], [f"--{field}={text}"], [f"--{field}.class_path={text}"]])
        )
    elif inner and isinstance(content.get(outer, {}), dict):
        content.setdefault(outer, {})[inner] = value
    else:
        content[outer] = value
    assert is_plain_or_one_line(reader, trap, content, flags)


def test_the_trap_works(trap):
    """What the other tests exclude could happen: the module is on the path."""
    try:
        assert importlib.import_module(MODULE).Thing is not None
    finally:
        sys.modules.pop(MODULE)
