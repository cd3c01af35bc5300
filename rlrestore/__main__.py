"""`python -m rlrestore`."""

from rlrestore.cli import main

if __name__ == "__main__":
    main()
