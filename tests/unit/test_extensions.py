"""User extensions: names in registries, objects by path, modules imported once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_dist.config import DataConfig, load_config
from detr_dist.errors import UsageError
from detr_dist.extensions import FOOTAGE, LOSSES, TRANSFORMS, Registry, import_extensions, load_object


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a user's file in the working directory, and remove its module afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("my_own_things.py").write_text(
        "executions = []\nexecutions.append(1)\nclass Thing:\n    value = 7\n", encoding="utf-8"
    )
    before = list(sys.path)
    yield "my_own_things"
    sys.path[:] = before
    sys.modules.pop("my_own_things", None)


@pytest.mark.parametrize("path", ["{}.Thing", "{}:Thing", "{}.py:Thing"])
def test_an_object_is_found_by_its_path(module: str, path: str) -> None:
    assert load_object(path.format(module), "training.callbacks").value == 7


def test_a_module_is_executed_once_under_all_its_names(module: str) -> None:
    import_extensions([f"{module}.py", module, str(Path(f"{module}.py").resolve())])
    load_object(f"{module}.py:Thing", "key")
    assert sys.modules[module].executions == [1]


@pytest.mark.parametrize("path", ["no_such_module.Thing", "no_such.py:Thing", "json.NoSuch", "json:"])
def test_a_failed_import_names_key_and_path(path: str) -> None:
    with pytest.raises(UsageError, match=rf"^data\.augmentation: {path} cannot be imported: ."):
        load_object(path, "data.augmentation")


def test_an_extension_that_raises_is_named_and_can_be_imported_again(module: str) -> None:
    Path("broken_things.py").write_text("raise ValueError('half done')\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"training\.extensions: broken_things\.py .*half done"):
            import_extensions(["broken_things.py"])


def test_one_name_has_one_definition_which_a_notebook_may_repeat() -> None:
    registry: Registry[object] = Registry("thing", built_in=("own",))
    namespace: dict[str, object] = {"__name__": "notebook"}
    for _ in range(2):
        exec("def same():\n    pass", namespace)  # a cell that is executed again
        registry.add("mine", namespace["same"])
    assert registry.find("mine", "key") is namespace["same"]
    exec("def other():\n    pass", namespace)
    for taken in ("mine", "own"):
        with pytest.raises(UsageError, match=f"thing '{taken}' exists already"):
            registry.add(taken, namespace["other"])
    with pytest.raises(UsageError, match=r"^key: there is no thing 'yours'; known are own, mine;"):
        registry.find("yours", "key")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("data.augmentation=ligth", "light"),
        ("data.augmentation=[light, dert]", "detr"),
        ("model.model_architecture=deformable-detr", "deformable_detr"),
        ("loss.weights={gio: 1}", "giou"),
    ],
)
def test_unknown_names_are_refused_unless_an_extension_may_add_them(override: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {nearest}\?$"):
        load_config(None, [override])
    assert load_config(None, [override, "training.extensions=mine.py"]).training.extensions == ["mine.py"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[light]", "light"),
        ("[]", "none"),
        ("[none]", "none"),
        ("[mosaic]", "mosaic"),
        ("[none, mosaic]", "mosaic"),
        ("[light, mosaic]", ["light", "mosaic"]),
    ],
)
def test_augmentations_that_mean_the_same_are_equal(written: str, meant: object) -> None:
    assert load_config(None, [f"data.augmentation={written}"]).data.augmentation == meant


def test_several_augmentations_keep_their_order() -> None:
    config = load_config(None, ["data.augmentation=[detr, package.Blur, mine.py:Noise]"])
    assert config.data.augmentation == ["detr", "package.Blur", "mine.py:Noise"]


@pytest.mark.parametrize(
    "names", ["[light, detr]", "[package.Blur, detr]", "[none, none]", "[light, footage]"]
)
def test_at_most_one_recipe_is_allowed_and_comes_first(names: str) -> None:
    with pytest.raises(
        UsageError, match=r"^data\.augmentation: of none, light, detr, footage there is one at most"
    ):
        load_config(None, [f"data.augmentation={names}"])


def test_the_registries_list_what_the_package_provides() -> None:
    recipes = ["none", "light", "detr", "footage"]
    others = ["mosaic", "mixup", "photometric", "zoom_out", "iou_crop", *FOOTAGE]
    assert TRANSFORMS.names[:14] == recipes + others
    described = str(DataConfig.model_fields["augmentation"].description)
    assert [name for name in recipes + others if f"`{name}`" not in described] == []
    assert LOSSES.names[:3] == ["ce", "bbox", "giou"]
