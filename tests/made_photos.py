"""Photos and maps to draw with, made of nothing."""

import numpy as np

WORDS = ["a", "red", "ball"]


def one_hot(row, column, shape=(7, 7)):
    alpha = np.zeros(shape)
    alpha[row, column] = 1.0
    return alpha


def made_photo(width, height):
    """A photo whose red rises to the right and whose green rises downwards."""
    rows, columns = np.mgrid[:height, :width]
    blue = np.full((height, width), 90)
    return np.stack([columns * 255 // width, rows * 255 // height, blue], axis=-1).astype(np.uint8)


def some_maps(count=3, shape=(7, 7), seed=0):
    maps = np.random.default_rng(seed).random((count, *shape)) ** 4
    return maps / maps.sum(axis=(1, 2), keepdims=True)
