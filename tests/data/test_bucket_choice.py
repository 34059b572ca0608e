"""Buckets chosen from the images: as many as asked for where the images are, and none that is nearly empty."""

import itertools
import math

import numpy as np
import pytest

from soar_mega.data.bucket_choice import choose_buckets
from soar_mega.data.buckets import generate_buckets, shape
from soar_mega.data.info import bucket_size

CANDIDATES = ["512x1024", "768x1024", "1024x1024", "1024x768", "1024x512", "2048x2048"]


def shapes(*images):
    return np.sort([shape(*image) for image, count in images for _ in range(count)])


def test_the_buckets_are_where_the_images_are():
    images = shapes(((1000, 1000), 50), ((400, 810), 20), ((4, 3), 20), ((1024, 512), 1))
    assert choose_buckets(images, CANDIDATES, 3, 0) == ["512x1024", "1024x1024", "1024x768"]
    assert choose_buckets(images, CANDIDATES, 1, 0) == ["1024x1024"]
    # no more than there are images for, and the first of those of one shape
    assert choose_buckets(images, CANDIDATES, 9, 0) == ["512x1024", "1024x1024", "1024x768", "1024x512"]
    assert choose_buckets(np.array([]), CANDIDATES, 2, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_other_choice_fits_better(count):
    candidates = generate_buckets(64, 16, 128)[:8]
    at = [shape(*bucket_size(bucket)) for bucket in candidates]
    images = np.sort(np.random.default_rng(0).choice(at, 100))

    def cut_off(chosen):
        return sum(min(abs(image - shape(*bucket_size(bucket))) for bucket in chosen) for image in images)

    best = min(cut_off(some) for some in itertools.combinations(candidates, min(count, len(candidates))))
    assert math.isclose(cut_off(choose_buckets(images, candidates, count, 0)), best, abs_tol=1e-9)


def test_small_buckets_go_to_the_nearest_that_is_left():
    images = shapes(((1, 1), 50), ((3, 4), 9), ((1, 2), 2), ((2, 1), 3))
    assert choose_buckets(images, CANDIDATES, None, 3) == ["768x1024", "1024x1024", "1024x512"]
    assert choose_buckets(images, CANDIDATES, None, 12) == ["1024x1024"]
    assert choose_buckets(images, CANDIDATES, None, 1000) == ["1024x1024"]
