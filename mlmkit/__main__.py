"""`python -m mlmkit`, which is also what torchrun starts."""

from mlmkit.cli import main

if __name__ == "__main__":
    main()
