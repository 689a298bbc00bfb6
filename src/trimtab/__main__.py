"""`python -m trimtab`, the same as the command `trimtab`."""

from .cli import main

main()
