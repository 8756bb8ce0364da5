"""`python -m peft_prefix_plus.cli` is the command `prefix-plus`."""

from . import main


main()
