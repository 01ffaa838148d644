"""The tiny model that the engines' tests train, for students that have an adapter of it."""

from tests.local.conftest import tiny, tiny_folder, train

__all__ = ["tiny", "tiny_folder", "train"]
