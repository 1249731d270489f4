"""What a script says in one line, instead of a traceback."""

# of examples/mnist_data.py, which examples/mnist.py uses without anything of this folder
from mnist_data import UsageError

__all__ = ["UsageError"]
