"""Written addresses and settings hold no credentials, and everything else is unchanged."""

import sys

import pytest

from detr_dist.config import Config, load_config, override_config
from detr_dist.errors import UsageError
from detr_dist.redaction import redact, redact_value, redacted_output


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://bob:hidden@host:5000/path", "http://host:5000/path"),
        ("https://hidden@host", "https://host"),
        ("http://bob@corp.com:hid@den/?#@host", "http://host"),
        ("http://bob:123456@host", "http://host"),
        ("postgresql+psycopg2://bob:1/hidden@host:5432/db?a=b", "postgresql+psycopg2://host:5432/db?a=b"),
        ("mysql://bob:hid den@host/db", "mysql://host/db"),
        ("http://h/?access_token=hidden&password=hidden&x=1", "http://h/?x=1"),
        ("mssql://h/db?x=1&PWD=hidden", "mssql://h/db?x=1"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhidden", "mssql+pyodbc:///"),
        ("http://h/?pass=hidden", "http://h/"),
        ("s3://b/k?X-Amz-Credential=hidden&X-Amz-Signature=hidden", "s3://b/k"),
        ("http://bob:hidden@host/a failed (http://bob:hidden@host)", "http://host/a failed (http://host)"),
        ("MLFLOW_TRACKING_PASSWORD=hidden is set", "MLFLOW_TRACKING_PASSWORD=*** is set"),
        ("MLFLOW_TRACKING_TOKEN='hid den', MODE=1", "MLFLOW_TRACKING_TOKEN=***, MODE=1"),
        ("Authorization: Bearer hidden", "Authorization: Bearer ***"),
        (r'{"password": "hid\"den", "a": 1}', '{"password": ***, "a": 1}'),
        ("model.config_overrides={hf_token: hidden, a: 1}", "model.config_overrides={hf_token: ***, a: 1}"),
        ("got {'api_key': 'hid, den', 'a': 1}", "got {'api_key': ***, 'a': 1}"),
    ],
)
def test_credentials_are_removed_from_addresses_and_masked_elsewhere(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b?x=a@b",
        "http://host:5000, and mail bob@host",
        "http://host: not there (models:/name@best)",
        "http://[::1]:5000/a@b",
        "sqlite:////home/bob/mlflow.db?timeout=60",
        "abfss://container@account.dfs.core.windows.net/a",
        "models:/players@best",
        "http://host/#/experiments/1/runs?viewStateShareKey=detr_dist_1&workflowType=machine_learning",
        "'batch_size=8' is not of the form section.key=value",
        '{"token": 3, "secret": {"a": 1}, "pad_token_id": "a"}',
    ],
)
def test_values_that_are_not_secret_stay(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_names_are_masked_at_any_depth() -> None:
    tree = {"a": [{"api_key": "hidden", "token": 0.5}], "password": "hidden", "uri": "http://a:hidden@b"}
    assert redact_value(tree) == {
        "a": [{"api_key": "***", "token": 0.5}],
        "password": "***",
        "uri": "http://b",
    }


def test_credentials_are_removed_from_the_written_configuration_only() -> None:
    uri = "http://bob:s3cret@host:5000"
    secrets = [f"logging.mlflow_tracking_uri={uri}", "model.config_overrides.hf_token=s3cret"]
    config = override_config(load_config(None, secrets), ["training.batch_size=1"])
    assert config.logging.mlflow_tracking_uri == uri
    assert "s3cret" not in config.to_yaml() + str(config.model_dump(mode="json"))
    written = Config.model_validate(config.model_dump(mode="json"))
    assert written.logging.mlflow_tracking_uri == "http://host:5000"


def test_errors_and_printed_messages_hold_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(UsageError("http://bob:hidden@host is away")) == "http://host is away"
    with redacted_output():
        print("at http://bob:hidden@host")
        print("at http://bob:hidden@host", file=sys.stderr)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("at http://host\n", "at http://host\n")
