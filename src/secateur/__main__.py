"""`python -m secateur`: the command line, for launchers."""

from secateur.cli.main import main

main()
