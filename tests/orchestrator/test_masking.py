"""Secrets in URIs, as they are written for databases, servers, buckets and packages."""

from __future__ import annotations

import pytest

from orchestrator.masking import masked, names_secret, shows_secret

SECRET = "tr0ub4dor"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{SECRET}@host:5000",
        f"https://{SECRET}@host/path",
        f"postgresql://me:{SECRET}@db/mlflow",
        f"postgresql://me:p/{SECRET}@db/mlflow",
        f"mysql+pymysql://me:p@{SECRET}@db:3306/mlflow",
        f"http://host/mlflow?password={SECRET}",
        f"http://host/mlflow?user=me&token={SECRET}&x=1",
        f"http://host/?api_key={SECRET}",
        f"https://bucket.s3.example/x?X-Amz-Signature={SECRET}",
        f"https://bucket/x?AWSSecretKey={SECRET};y=2",
        f"https://host/x?AWSAccessKeyId={SECRET}",
        f"https://host/x?apikey={SECRET}",
        f"https://host/x?y=2&key={SECRET}",
        f"sqlite:///x.db?PWD={SECRET}",
        f"git+https://user:{SECRET}@host/repository",
    ],
)
def test_a_uri_is_shown_without_its_secret(uri: str) -> None:
    for text in (uri, f"cannot connect to {uri} now", f"{uri}: refused"):
        assert shows_secret(text)
        assert SECRET not in masked(text)
        assert not shows_secret(masked(text).replace("//***@", "//"))
        assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://host:5000/experiments/me@example",
        "sqlite:////srv/mlflow.db",
        "s3://bucket/path",
        "git+ssh://git@host/repository",
        "http://host/?author=me&page=2",
        "http://host/?searchKey=abc&keyboard=de&monkey=1",
        "numpy==2.4.6",
    ],
)
def test_what_has_no_secret_is_no_secret(uri: str) -> None:
    assert not shows_secret(uri)
    assert masked(uri) == uri.replace("//git@", "//***@")


def test_what_follows_a_masked_value_stays() -> None:
    assert masked("http://h/?password=x&sslmode=require is away") == (
        "http://h/?password=***&sslmode=require is away"
    )


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={SECRET}",
        f"export WANDB_API_KEY='{SECRET}' fails",
        f'hf_token="{SECRET}", x=1',
        f"submit --env=HF_TOKEN=a,{SECRET}",
        f"connection to host=db password={SECRET} user=me",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}",
        f"Authorization: {SECRET}",
        f"sent Bearer {SECRET}{SECRET}",
    ],
)
def test_a_setting_and_a_header_are_shown_without_their_secret(text: str) -> None:
    shown = masked(text)
    assert SECRET not in shown
    assert "***" in shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "the trial key=4f3a7c91 failed",
        "BATCH_TOKENS=4096 NUM_KEY_VALUE_HEADS=8 monkey=1",
        "the bearer of a certificate",
        "numpy==2.4.6",
    ],
)
def test_an_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert masked(text) == text


ORDINARY = """PATH OMP_NUM_THREADS TOKENS BATCH_TOKENS TOKENIZERS_PARALLELISM NUM_KEY_VALUE_HEADS
MAX_TOKEN_LENGTH TOKEN_DROPOUT TOKENIZED_DIR PRETOKENIZE HOTKEY KEYBOARD HF_TOKEN_PATH
GOOGLE_APPLICATION_CREDENTIALS"""
SECRETS = """HF_TOKEN hf_token WANDB_API_KEY OPENAI_APIKEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
AZURE_STORAGE_KEY DB_PASSWORD PGPASSWORD MYSQL_PASSWD CLIENT_SECRET CLIENT_SECRET_ID API_KEY_2 KEY
TOKEN GITHUB_ACCESSTOKEN"""


@pytest.mark.parametrize("name", ORDINARY.split())
def test_an_ordinary_variable(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_variable_of_a_secret(name: str) -> None:
    assert names_secret(name)
