"""`python -m mlmkit`, which torchrun uses too."""

from mlmkit.cli import main

if __name__ == "__main__":
    main()
