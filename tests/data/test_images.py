"""Images and buckets: upright, covering the bucket, cut in the middle."""

import numpy as np
import pytest
import torch
from damaged_pictures import damaged_pictures
from PIL import Image, PngImagePlugin

from soar_mega.data.buckets import check_buckets, generate_buckets, nearest_bucket
from soar_mega.data.images import ImageError, fit, image_size, read_image, to_model_range
from soar_mega.data.info import bucket_size


def test_generated_buckets_keep_area_ratio_and_multiple():
    buckets = [bucket_size(bucket) for bucket in generate_buckets(512, 16, 1536)]
    assert (512, 512) in buckets and len(buckets) > 8
    assert all((height, width) in buckets for width, height in buckets)
    for width, height in buckets:
        assert width % 32 == height % 32 == 0 and 0.5 <= width / height <= 2
        assert width * height == pytest.approx(512**2, rel=0.07)


def test_generated_buckets_stay_within_the_transformers_positions():
    assert all(max(bucket_size(bucket)) <= 20 for bucket in generate_buckets(16, 4, 20))


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("30x32", "multiples of 16 pixels, for example 32x32"),
        ("32x128", "64 pixels a side at most"),
        ("axb", "WIDTHxHEIGHT"),
    ],
)
def test_a_bucket_that_the_model_cannot_take_is_refused(bucket, message):
    with pytest.raises(ValueError, match=message):
        check_buckets(["16x16", bucket], 16, 64)


def test_the_bucket_of_nearest_aspect_is_chosen():
    buckets = ["12x20", "16x16", "20x12"]
    assert nearest_bucket(1000, 990, buckets) == "16x16"
    assert nearest_bucket(300, 500, buckets) == "12x20"
    assert nearest_bucket(5, 1, buckets) == "20x12"


def test_an_exact_fit_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(fit(image, 20, 12), torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(
        fit(image, 20, 12, mirrored=True), torch.from_numpy(pixels[:, ::-1].copy()).permute(2, 0, 1)
    )


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (12, 20)])
@pytest.mark.parametrize("shape", [(37, 21), (7, 31), (15, 15), (400, 301)])
def test_the_middle_is_cut_out(shape, size):
    """An image whose left and right (or top and bottom) halves differ stays centred whatever is cut away."""
    width, height = shape
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, :, 0] = 255
    pixels[:, : width // 2, 1] = 255
    result = fit(Image.fromarray(pixels), *size).float() / 255
    assert result.shape == (3, size[1], size[0])
    assert result[0].mean() == pytest.approx(0.5, abs=0.12)
    assert result[1].mean() == pytest.approx(0.5, abs=0.12)
    assert result[0, 0].mean() > 0.9 and result[1, :, 0].mean() > 0.9


def test_transparent_parts_become_white_and_grey_becomes_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    assert np.all(np.array(read_image(tmp_path / "clear.png")) == 255)
    assert np.all(np.array(read_image(tmp_path / "grey.png")) == 100)


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    values = np.array([[0, 20000, 40000, 65535]], dtype=np.uint16)
    for name, settings, shades in (
        ("plain.png", {}, [0, 78, 156, 255]),
        ("see_through.png", {"transparency": 20000}, [0, 255, 156, 255]),
    ):
        Image.fromarray(values).save(tmp_path / name, **settings)
        with Image.open(tmp_path / name) as file:
            assert file.mode == "I;16"
        assert np.array(read_image(tmp_path / name))[0].tolist() == [[shade] * 3 for shade in shades]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == image_size(tmp_path / "turned.jpg") == (4, 8)


def test_a_damaged_file_says_so(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "cut.jpg")
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="^cannot be read as an image: its bytes are of no kind"):
            read(tmp_path / "text.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_a_picture_holds_it_is_an_error_of_ours(tmp_path):
    for kind, content in damaged_pictures().items():
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(ImageError, match="cannot be read as an image") as error:
            read_image(tmp_path / "x.jpg")
        assert not isinstance(error.value.__cause__, OSError | ValueError), kind


def test_a_long_thin_picture_is_cut_before_it_grows(monkeypatch):
    """Its middle fills the bucket; all of it would be 512 x 768000 pixels."""
    made = []
    new = Image.Image.resize

    def resize(self, size, *rest, **named):
        made.append(size)
        return new(self, size, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    pixels = np.zeros((3000, 2, 3), dtype=np.uint8)
    pixels[1498:1502] = 255
    assert fit(Image.fromarray(pixels), 512, 512).float().mean() > 250
    assert made == [(512, 512)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_refused(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    path = tmp_path / f"moving.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="^is animated.* 3 pictures"):
            read(path)


def test_a_photograph_with_a_preview_behind_it_is_one_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))]
    )
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").size == (8, 8)


def test_long_text_in_a_png_does_not_matter(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", pnginfo=text)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_the_range_is_the_vaes():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
