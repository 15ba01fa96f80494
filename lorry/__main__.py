"""`python -m lorry` is the command `lorry`."""

from lorry.cli.main import main

if __name__ == "__main__":
    main()
