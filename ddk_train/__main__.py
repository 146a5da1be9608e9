"""`accelerate launch -m ddk_train run …`: the command line in several processes."""

from ddk_train.cli import main

main(prog_name="ddk-train")
