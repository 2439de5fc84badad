"""`python -m impasto`: the same as `impasto`."""

from impasto.cli import main

if __name__ == "__main__":
    main()
