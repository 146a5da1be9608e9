"""Which URLs name a store, and what of them may be shown.

A URL that holds credentials is refused before anything is done with it, so that they never reach
a message, a run's config or a report.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from ddk_cache.errors import InputError

SCHEMES = ("s3", "gs", "az", "file", "memory", "https", "http", "hf")
"""The last three are for reading: web servers, and the Hugging Face Hub."""

ON_THIS_MACHINE = ("file", "memory")
"""Schemes that need no network."""

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (AWS_ENDPOINT_URL for a store "
    "that is not Amazon's; AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN (or run 'hf auth login')",
}
"""Scheme → the environment variables from which credentials are taken."""


def scheme_of(url: str) -> str:
    """Return what stands before `://`."""
    return url.partition("://")[0].lower()


def check_url(url: str) -> None:
    """Raise InputError for a URL of an unsupported scheme, or with credentials or options in it."""
    scheme, shown = scheme_of(url), redact(url)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(
            f"{shown} cannot be opened: {scheme}:// is not supported. Use one of {known}, or a "
            "local path."
        )
    if shown != url:
        names = CREDENTIALS.get(scheme)
        raise InputError(
            f"{shown}: credentials and options in a URL are not used, and would end up in logs. "
            + (f"Set {names} in the environment instead." if names else "Leave them out.")
        )


def redact(url: str) -> str:
    """Return a URL without its user, password, query and fragment; a path as it is."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:
        return f"{scheme}://…"
    user, at, host = parts.netloc.rpartition("@")
    query = "?…" if parts.query or parts.fragment else ""
    return f"{scheme}://{'…' if at else user}{at}{host}{parts.path}{query}"
