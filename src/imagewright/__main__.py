"""`python -m imagewright` is the `imagewright` command."""

from imagewright.cli.main import main

if __name__ == "__main__":
    main()
