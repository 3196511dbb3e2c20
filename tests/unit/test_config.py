"""Configuration: shipped files load, and errors name what is wrong."""

from pathlib import Path

import pytest

from detr_dist.config import Config, describe_keys, load_config
from detr_dist.errors import UsageError
from detr_dist.training.report import ignored_variables

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path) != Config()  # says more than the defaults do


def test_the_resolved_configuration_loads_as_itself(tmp_path: Path) -> None:
    config = load_config(CONFIGS[0], ["training.mixed_precision=no", "model.freeze_batch_norm=true"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_an_unquoted_no_in_yaml_means_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  mixed_precision: no\n")
    assert load_config(path).training.mixed_precision == "no"


def test_an_override_changes_a_key_of_a_mapping_or_replaces_it() -> None:
    deep = load_config(None, ["model.config_overrides.encoder_ffn_dim=64", "training.learning_rate=5e-4"])
    assert deep.model.config_overrides == {"encoder_ffn_dim": 64}
    assert deep.training.learning_rate == 5e-4
    quickstart = next(path for path in CONFIGS if path.name == "quickstart.yaml")
    assert load_config(quickstart, ["model.backbone=resnet18"]).model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.batchsize=1", "training.batch_size"),
        ("trainig.batch_size=1", "training"),
        ("data.batch_size=1", "training.batch_size"),
        ("training.seed=true", "training.seed"),
        ("training.mixed_precision=fp8", "'bf16'"),
        ("evaluation.score_threshold=1.5", "a number from 0 to 1 or auto is wanted, got 1.5$"),
        (
            "evaluation.size_bands=[16, 8]",
            r"evaluation\.size_bands: ascending numbers are wanted, got \[16, 8\]$",
        ),
        ("evaluation.score_threshold=best", "a number from 0 to 1 or auto is wanted, got 'best'$"),
        ("evaluation.score_threshold=true", "a number from 0 to 1 or auto is wanted, got True$"),
        ("evaluation.score_threshold=.nan", "a number from 0 to 1 or auto is wanted, got nan$"),
        ("data.num_workers=-1", "a whole number from 0 or auto is wanted, got -1$"),
        ("data.num_workers=all", "a whole number from 0 or auto is wanted, got 'all'$"),
        ("data.num_workers=true", "a whole number from 0 or auto is wanted, got True$"),
        ("model.model_architecture=yolo", "dab_detr"),
        ("data.repeat_rare=0", r"data\.repeat_rare"),
        ("loss.class_weights={ball: 0}", r"loss\.class_weights: input should be greater than 0, got 0$"),
        ("loss.class_weights={ball: .inf}", r"loss\.class_weights: .* a finite number, got inf$"),
    ],
)
def test_an_error_for_a_wrong_key_or_value_lists_what_is_allowed(override: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        load_config(None, [override])


def test_a_single_number_is_a_list_of_one() -> None:
    config = load_config(None, ["evaluation.size_bands=16", "data.multi_scale=480"])
    assert (config.evaluation.size_bands, config.data.multi_scale) == ([16], [480])


@pytest.mark.parametrize(
    "written",
    [
        "123456",
        "123_4",
        "007",
        "1e3",
        "12:30:45",
        "2026-05-01",
        "2026-13-45",
        "2026-05-01 10:00:00",
        "on",
        "1.50",
    ],
)
def test_text_settings_keep_values_that_yaml_reads_as_other_types(written: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    keys = ("mlflow_run_name", "mlflow_experiment_name", "mlflow_tracking_uri", "register_model_as")
    if ":" in written:
        keys = keys[:3]
    path.write_text("logging:\n" + "".join(f"  {key}: {written}\n" for key in keys))
    in_file = load_config(path).logging
    on_command_line = load_config(None, [f"logging.{key}={written}" for key in keys]).logging
    for key in keys:
        assert getattr(in_file, key) == getattr(on_command_line, key) == written
    assert load_config(None, [f"model.pretrained={written}"]).model.pretrained == written


@pytest.mark.parametrize("value", ["sqlite:////data/run #1/m.db", "#1", "a#b", "a # b"])
def test_a_hash_on_the_command_line_starts_no_comment(value: str) -> None:
    assert load_config(None, [f"logging.mlflow_tracking_uri={value}"]).logging.mlflow_tracking_uri == value
    assert load_config(None, [f"logging.mlflow_run_name='{value}'"]).logging.mlflow_run_name == value
    with pytest.raises(UsageError, match=r"training\.seed.*'5 #1'"):
        load_config(None, ["training.seed=5 #1"])


def test_a_merged_value_of_a_text_setting_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("logging:\n  <<: {mlflow_run_name: 5}\n  log_every_steps: 3\n")
    assert load_config(path).logging.mlflow_run_name == "5"


def test_a_section_without_keys_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training:\ndata:\n  # num_workers: 2\nlogging:\nmodel:\n  config_overrides:\n")
    assert load_config(path) == Config()
    assert load_config(path, ["training.seed=1"]).training.seed == 1
    path.write_text("trainig:\n")
    with pytest.raises(UsageError, match="training"):
        load_config(path)


def test_mlflow_variables_apply_unless_yaml_or_the_command_line_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"TRACKING_URI": "http://host:5000", "EXPERIMENT_NAME": "theirs", "RUN_NAME": "7"}
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    keys = [f"mlflow_{name.lower()}" for name in variables]
    unset, given = tmp_path / "unset.yaml", tmp_path / "given.yaml"
    unset.write_text("logging:\n" + "".join(f"  {key}: null\n" for key in keys))
    given.write_text("logging:\n" + "".join(f"  {key}: mine\n" for key in keys))
    for path in (None, unset, *CONFIGS):
        config = load_config(path)
        assert [getattr(config.logging, key) for key in keys] == list(variables.values())
        assert list(ignored_variables(config)) == []
    config = load_config(given)
    assert [getattr(config.logging, key) for key in keys] == ["mine"] * 3
    assert len(list(ignored_variables(config))) == 3
    for name in variables:
        monkeypatch.setenv(f"MLFLOW_{name}", "")
    assert list(ignored_variables(config)) == []
    assert load_config(None).logging.mlflow_tracking_uri == "sqlite:///mlflow.db"
    assert load_config(None).logging.mlflow_run_name is None


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "\x00"])
def test_a_file_without_a_mapping_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"broken\.yaml"):
        load_config(path)


@pytest.mark.parametrize(("content", "line"), [("a: [1\nb: 2\n", 2), ("a:\n  b: 'c\n", 3), ("a: b: c\n", 1)])
def test_invalid_yaml_is_named_with_its_file_and_line(content: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(
        UsageError, match=rf"^{path}: not valid YAML in line {line}, column \d+: \w"
    ) as raised:
        load_config(path)
    assert "<byte string>" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "key", "line", "first"),
    [
        ("training: {seed: 1}\nevaluation: {}\n\ntraining: {num_epochs: 3}\n", "training", 4, 1),
        ("training:\n  seed: 1\n  batch_size: 2\n  seed: 1\n", "seed", 4, 2),
        ("model:\n  config_overrides:\n    a: [{b: 1,\n      b: 1}]\n", "b", 4, 3),
        ("training:\n  'seed': 1\n  seed: 2\n", "seed", 3, 2),
    ],
)
def test_a_duplicate_key_is_named_with_both_lines(
    content: str, key: str, line: int, first: int, tmp_path: Path
) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=rf"twice\.yaml: line {line}: the key '{key}' .* in line {first}\b"):
        load_config(path)


def test_an_override_with_a_duplicate_key_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.config_overrides=.*'a'"):
        load_config(None, ["model.config_overrides={a: 1, b: {c: 1}, a: 2}"])


def test_an_override_may_come_from_a_command_line_in_another_locale() -> None:
    escaped = "logging.mlflow_run_name=Läufe".encode().decode("ascii", "surrogateescape")
    assert load_config(None, [escaped]).logging.mlflow_run_name == "Läufe"


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("model:\n  config_overrides:\n    a: &a {b: 1, c: 1}\n    d: {<<: *a, c: 2}\n")
    assert load_config(path).model.config_overrides["d"] == {"b": 1, "c": 2}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_be_saved_by_any_editor(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes("logging: {mlflow_run_name: Läufe 球}\n".encode(encoding))
    assert load_config(path).logging.mlflow_run_name == "Läufe 球"


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes("logging: {mlflow_run_name: Läufe}\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"settings\.yaml: not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(
    ("given", "threshold"), [("auto", "auto"), ("0.3", 0.3), ("1", 1.0), ("1e-3", 0.001)]
)
def test_a_score_threshold_is_a_number_or_auto(given: str, threshold: float | str) -> None:
    assert load_config(None, [f"evaluation.score_threshold={given}"]).evaluation.score_threshold == threshold


def test_a_setting_is_not_assigned_but_changed_in_a_copy() -> None:
    training = Config().training
    with pytest.raises(UsageError, match=r"^TrainingConfig\.batch_size .*model_copy\(update={'batch_size': "):
        training.batch_size = 2
    assert training.batch_size == Config().training.batch_size
    assert training.model_copy(update={"batch_size": 2}).batch_size == 2


def test_every_key_has_a_description() -> None:
    keys = list(describe_keys())
    assert len(keys) > 30
    assert all(meaning.endswith(".") for _, _, meaning in keys)
    assert Config() == load_config(None)


@pytest.mark.parametrize(
    ("given", "value"),
    [("true", True), ("false", False), ("'true'", True), ("weights/r50.pth", "weights/r50.pth")],
)
def test_pretrained_backbone_is_a_switch_or_a_path(given: str, value: bool | str) -> None:
    assert load_config(None, [f"model.pretrained_backbone={given}"]).model.pretrained_backbone is value or (
        isinstance(value, str)
    )


def test_a_problem_names_the_file_only_if_it_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("training: {batch_size: 0}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_config(path, ["training.num_epoch=3"])
    in_file, overridden = sorted(str(caught.value).splitlines())
    assert in_file.startswith(f"{path}: training.batch_size: ")
    assert overridden.startswith("training.num_epoch: ")


def test_families_that_do_not_see_padding_get_square_images_unless_configured_otherwise() -> None:
    family = "model.model_architecture=rt_detr_v2"
    assert load_config(None, [family]).data.resize == "square"
    assert load_config(None, [family, "data.resize=rectangle"]).data.resize == "rectangle"
    assert load_config(None, []).data.resize == "shortest_edge"
