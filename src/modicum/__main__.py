"""`python -m modicum`, for programs that start modules, such as torchrun."""

from modicum.cli.main import run

if __name__ == "__main__":
    run()
