"""`python -m orchestrator`: the command line where it is staged rather than installed."""

from orchestrator.cli import main

main()
