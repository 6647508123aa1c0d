"""`python -m veneer.cli`."""

from veneer.cli import main

main()
