import numpy as np
import pytest

from soar_mega.examples.digits.canvases import COLOURS, make_canvas
from soar_mega.examples.digits.verifier import Verifier


@pytest.fixture(scope="module")
def verifier():
    return Verifier.fit()


def test_tells_the_digits_of_scans_it_never_saw(verifier):
    assert verifier.accuracy("held_out") > 0.97
    assert verifier.accuracy("generator") > 0.97


def test_is_fitted_once(verifier):
    assert Verifier.fit() is verifier


@pytest.mark.parametrize("split", ["held_out", "generator"])
def test_reads_whole_canvases(verifier, split):
    canvases = [make_canvas(11, i, split=split) for i in range(200)]
    read = verifier.read_all(np.stack([c.image for c in canvases]))
    assert np.mean([cells == c.cells for cells, c in zip(read, canvases)]) > 0.95
    # Which cells are empty, and every colour, is exact on clean canvases.
    for cells, canvas in zip(read, canvases):
        assert [c and c[0] for c in cells] == [c and c[0] for c in canvas.cells]
    assert {c[0] for cells in read for c in cells if c} == set(COLOURS)


def test_one_image_reads_as_in_a_batch(verifier):
    image = make_canvas(11, 3).image
    assert verifier.read(image) == verifier.read_all(np.stack([image, image]))[1]


def test_black_canvas_is_empty(verifier):
    assert verifier.read(np.zeros((3, 16, 16))) == (None,) * 4
    assert not verifier.features(np.zeros((1, 3, 16, 16))).any()


def test_features_tell_cells_apart(verifier):
    canvas = next(c for c in (make_canvas(11, i) for i in range(50)) if c.caption.kind == "single_object")
    features = verifier.features(canvas.image[None]).reshape(4, 14)
    (occupied,) = [i for i in range(4) if canvas.cells[i]]
    assert features[[i for i in range(4) if i != occupied]].max() == 0
    assert features[occupied, 4:].argmax() == canvas.cells[occupied][1]
    assert features[occupied, 1:4].tolist() == list(COLOURS[canvas.cells[occupied][0]])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 3, 8, 8)), r"got shape \[2, 3, 8, 8\]"),
        (np.full((1, 3, 16, 16), -0.5), r"images in \[0, 1\]"),
        (np.full((1, 3, 16, 16), np.nan), r"images in \[0, 1\]"),
    ],
)
def test_bad_input(verifier, images, words):
    with pytest.raises(ValueError, match=words):
        verifier.read_all(images)
