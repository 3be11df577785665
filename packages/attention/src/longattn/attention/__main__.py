"""`python -m longattn.attention`: the command `longattn`."""

from longattn.attention.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
