"""Which URLs are accepted, and that nothing secret in them is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_cache import InputError, StorageError, open_cache
from ddk_cache.storage.open import open_storage
from ddk_cache.storage.remote import RemoteStorage
from ddk_cache.storage.url import redact

SECRETS = [
    "s3://KEY:hunter2@bucket/mix.zarr",
    "https://user:hunter2@host/mix.zarr",
    "az://container/mix.zarr?sig=hunter2",
    "gs://hunter2@bucket/mix.zarr#hunter2",
    "s3://[hunter2@bucket/mix.zarr",
]


@pytest.mark.parametrize("url", SECRETS)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    assert "hunter2" not in redact(url)
    with pytest.raises(InputError) as caught:
        open_cache(url)
    assert "hunter2" not in str(caught.value)


def test_the_message_names_the_variables_to_use() -> None:
    with pytest.raises(InputError, match=r"s3://…@bucket/x: credentials .* AWS_ACCESS_KEY_ID"):
        open_storage("s3://KEY:hunter2@bucket/x")


@pytest.mark.parametrize("url", ["gopher://host/x", "ftp://host/x", "://x"])
def test_what_is_not_supported_is_said_with_what_is(url: str) -> None:
    with pytest.raises(InputError, match=r"not supported. Use one of s3://, gs://, az://, file://"):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://bucket/a b/mix.zarr", "file:///tmp/x", "memory:///"])
def test_other_urls_are_shown_as_they_are(url: str) -> None:
    assert redact(url) == url


def test_a_path_is_no_url(tmp_path: Path) -> None:
    assert open_storage(tmp_path / "s3:").uri() == str(tmp_path / "s3:")


@pytest.mark.parametrize("seconds", ["abc", "-1", "0", "nan", "inf", "1e9"])
def test_a_patience_that_is_no_time_is_refused(
    seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("DDK_PATIENCE", seconds)
    with pytest.raises(InputError, match=f"DDK_PATIENCE: got '{seconds}', expected seconds"):
        open_storage("memory:///")


def test_missing_credentials_are_said_with_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    # A machine outside of a cloud: nobody answers where one would be asked for credentials.
    monkeypatch.setenv("NO_PROXY", "169.254.169.254")
    with pytest.raises(StorageError, match=r"no credentials were found\. Set AWS_ACCESS_KEY_ID"):
        RemoteStorage("s3://bucket/mix.zarr", patience=0.5).get("zarr.json")
