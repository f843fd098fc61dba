"""`python -m secateur`, so that launchers can start the command line."""

from secateur.cli.main import main

main()
