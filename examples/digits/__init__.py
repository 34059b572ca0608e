"""The built-in images, canvases of handwritten digits, with the scorer that reads them and what else measures them.

canvases.py     draws images with captions
verifier.py     reads what an image shows
scorer.py       the scorer `digits`, by verifier and caption: a metric of a suite, and a reward
benchmark.py    scores a set of images by category
energy.py       the distance of a set of images from true ones
__main__.py     measures pipelines that draw canvases: python -m soar_mega.examples.digits
"""

from importlib.util import find_spec

if find_spec("sklearn") is None:
    raise ModuleNotFoundError(
        "the digits are scans of scikit-learn's, which is not installed: pip install 'soar_mega[digits]'",
        name="sklearn",
    )
