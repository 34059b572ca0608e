import numpy as np
import pytest
from PIL import Image

from soar_mega.examples.digits.benchmark import fulfils, read_back
from soar_mega.examples.digits.canvases import (
    KINDS,
    RELATIONS,
    SPLITS,
    draw_caption,
    make_canvas,
    place,
    render,
    scans,
    write_image_folder,
)


def test_splits_share_no_scan_and_use_all():
    parts = {split: scans(split)[0].reshape(-1, 64) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [800, 800, 197]
    # No two of the 1797 scans are equal, so equal pixels would mean a shared scan.
    assert len(np.unique(np.concatenate(list(parts.values())), axis=0)) == 1797


def test_canvas_is_a_function_of_seed_and_index():
    first, again, other, reseeded = make_canvas(3, 5), make_canvas(3, 5), make_canvas(3, 6), make_canvas(4, 5)
    assert first.caption == again.caption and np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, reseeded.image)


def test_first_canvases_of_seed_zero_have_not_changed():
    assert [make_canvas(0, i).caption.text for i in range(3)] == [
        "a white 2 and a red 4",
        'the number "5382"',
        "a 4",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_placed_cells_fulfil_their_caption_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    for _ in range(100):
        caption = draw_caption(rng, kind)
        cells = place(rng, caption)
        assert read_back(caption, cells) == 1.0 if kind == "ocr" else fulfils(caption, cells)
        assert sum(cell is not None for cell in cells) == len(caption.digits) * caption.count


def test_relations_are_what_their_words_say():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(200):
        caption = draw_caption(rng, "position")
        cells = place(rng, caption)
        first, second = ([c and c[1] for c in cells].index(d) for d in caption.digits)
        step = {-2: "below", -1: "right of", 1: "left of", 2: "above"}[second - first]
        assert caption.relation == step and f" {step} " in caption.text
        seen.add(step)
    assert seen == set(RELATIONS)


def test_render_puts_a_scan_of_the_split_in_its_colour_into_its_cell():
    image = render(np.random.default_rng(0), (None, ("yellow", 7), None, None), "held_out")
    cell = image[:, :8, 8:]
    images, digits = scans("held_out")
    assert any(np.array_equal(cell[0], scan) for scan in images[digits == 7])
    assert np.array_equal(cell[0], cell[1]) and not cell[2].any()
    assert not image[:, 8:].any() and not image[:, :, :8].any()


def test_noise_of_the_pretraining_variant_comes_in_the_stated_shares():
    clean = [make_canvas(0, i) for i in range(200)]
    assert all(c.caption.kind == "ocr" or fulfils(c.caption, c.cells) for c in clean)
    noisy = [make_canvas(0, i, noisy=True) for i in range(3000)]
    # A wrong caption of a colour kind practically never fits by chance; a shuffled canvas still shows its colours.
    wrong = [not fulfils(c.caption, c.cells) for c in noisy if c.caption.kind == "color_attr"]
    assert np.mean(wrong) == pytest.approx(0.15, abs=0.05)
    extra = [
        len([c for c in x.cells if c]) > 2 for x in noisy if x.caption.kind in ("color_attr", "two_object")
    ]
    assert np.mean(extra) == pytest.approx(0.05, abs=0.025)
    empty = [x.image[:, :8, :8] for x in noisy if x.cells[0] is None]
    # Black pixels keep the upper half of Gaussian noise: mean .04/sqrt(2 pi).
    assert np.mean(empty) == pytest.approx(0.04 / np.sqrt(2 * np.pi), rel=0.02)


def test_image_folder(tmp_path):
    write_image_folder(tmp_path / "images", 3, seed=2)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"00000{i}.{kind}" for i in range(3) for kind in ("png", "txt")]
    for i in range(3):
        canvas = make_canvas(2, i)
        pixels = np.asarray(Image.open(tmp_path / f"images/00000{i}.png"), dtype=np.float32) / 255
        assert np.abs(pixels.transpose(2, 0, 1) - canvas.image).max() <= 0.5 / 255 + 1e-6
        assert (tmp_path / f"images/00000{i}.txt").read_text().strip() == canvas.caption.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: scans("test"), "unknown split 'test'"),
        (lambda path: draw_caption(np.random.default_rng(0), "three_object"), "unknown kind of caption"),
        (lambda path: write_image_folder(path, 0, seed=0), "count must be positive"),
    ],
)
def test_bad_input(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
