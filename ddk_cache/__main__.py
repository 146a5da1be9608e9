"""`python -m ddk_cache build …`: the command line."""

from ddk_cache.cli import main

main(prog_name="ddk-cache")
