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


@pytest.mark.parametrize("name", ["PATH", "OMP_NUM_THREADS", "TOKENS", "TOKENIZERS_PARALLELISM"])
def test_an_ordinary_variable(name: str) -> None:
    assert not names_secret(name)
