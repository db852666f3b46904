"""`python -m mmcontrast`, which torchrun needs."""

from mmcontrast.cli import main

if __name__ == "__main__":
    main()
