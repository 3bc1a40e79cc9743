"""Sizes of videos and of the images that they start from."""

import warnings

import numpy as np
import pytest
from PIL import Image

from rcm_jax.cli import one_line_errors
from rcm_jax.media.images import first_frame, open_image, pixels
from rcm_jax.media.pictures import grid, tiled
from rcm_jax.media.sizes import MAX_SIDE, RESOLUTIONS, adapted_size, columns, latent_shape, parse_size, table_size

WAN = {"space": 8, "time": 4, "patch": 2}


def test_the_table_has_the_published_sizes():
    assert table_size("480p", "16:9") == (832, 480)
    assert table_size("720p", "9:16") == (720, 1280)
    for sizes in RESOLUTIONS.values():
        for ratio, (w, h) in sizes.items():
            a, b = map(int, ratio.split(":"))
            assert w / h == pytest.approx(a / b, rel=0.03)
            assert latent_shape((w, h), 77, **WAN) == (20, h // 8, w // 8)


@pytest.mark.parametrize("asked", [("1080p", "16:9"), ("480p", "2:1")])
def test_what_is_not_in_the_table_gets_the_table(asked):
    with pytest.raises(ValueError, match=rf"{asked[0]}.*{asked[1]}.*832x480.*720p.*1280x720"):
        table_size(*asked)


def test_sizes_and_frames_that_are_not_possible():
    assert parse_size("64x32") == (64, 32)
    for text in ("64", "64*32", "ax3", "64x-32"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(text)
    with pytest.raises(ValueError, match="40x32.*multiples of 16"):
        latent_shape((40, 32), 5, **WAN)
    with pytest.raises(ValueError, match="0x32"):
        latent_shape((0, 32), 5, **WAN)
    for frames, near in ((80, "77 or 81"), (0, "1 or 5"), (-3, "1 or 5")):
        with pytest.raises(ValueError, match=near):
            latent_shape((32, 32), frames, **WAN)


@pytest.mark.parametrize("image", [(1920, 1080), (300, 900), (512, 512)])
def test_adapted_sizes_keep_area_and_proportions(image):
    w, h = adapted_size(image, 832 * 480, 16)
    assert w % 16 == h % 16 == 0
    assert w * h == pytest.approx(832 * 480, rel=0.05)
    assert w / h == pytest.approx(image[0] / image[1], rel=0.05)


def test_images_are_upright_and_in_range(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 20:] = 255
    exif = Image.Exif()
    exif[274] = 3  # lies upside down
    Image.fromarray(picture).save(tmp_path / "i.png", exif=exif)
    image = open_image(tmp_path / "i.png")
    small = pixels(image, (8, 4))
    assert small.shape == (4, 8, 3)
    assert small[:, :2].min() == 1
    assert small[:, -2:].max() == -1
    assert pixels(image).shape == (20, 40, 3)
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "a.png")
    assert pixels(open_image(tmp_path / "a.png")).shape == (20, 40, 3)


def test_a_first_frame_is_stretched_or_cut_by_lanczos():
    picture = np.zeros((16, 64, 3), np.uint8)
    picture[:, 16:-16] = np.arange(0, 256, 8)[:, None]  # black at both ends
    image = Image.fromarray(picture)
    stretched, cut = (first_frame(image, (16, 16), cut=how) for how in (False, True))
    assert stretched[:, 0].max() == stretched[:, -1].max() == -1
    np.testing.assert_array_equal(cut, pixels(image.crop((24, 0, 40, 16))))
    assert np.abs(stretched - pixels(image, (16, 16))).max() > 0.02  # which is bilinear


def test_an_image_that_is_none(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"x\.png is not an image"):
        open_image(tmp_path / "x.png")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.png is not an image"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match=r"no image at .*nowhere\.png"):
        open_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint16, 65535), (">u2", 65535), (np.int32, 65535), (np.float32, 1), (np.float32, 255)]
)
def test_deep_images_are_scaled_not_clipped(tmp_path, dtype, white):
    ramp = np.linspace(0, 255, 64).round().reshape(8, 8)
    Image.fromarray((ramp * (white / 255)).astype(dtype)).save(tmp_path / "deep.tif")
    seen = np.asarray(open_image(tmp_path / "deep.tif"))
    np.testing.assert_array_equal(seen, np.repeat(ramp[..., None], 3, axis=-1))


def test_values_that_are_no_picture_are_refused(tmp_path):
    for values in ([[-1.0, 0.5]], [[float("nan"), 0.5]], [[0.0, 1e6]]):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=r"x\.tif .* its values go from .* 0\.\.65535"):
            open_image(tmp_path / "x.tif")


def with_alpha(mode, tmp_path):
    """Left red, right transparent black."""
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:, :4] = (255, 0, 0, 255)
    image = Image.fromarray(picture)
    if mode == "P":
        flat = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        flat.save(tmp_path / "a.png", transparency=flat.getpixel((7, 0)))
    else:
        image.convert(mode).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_on_white_and_it_is_said(tmp_path, mode):
    path = with_alpha(mode, tmp_path)
    with pytest.warns(UserWarning, match=r"a\.png has transparent pixels: they are shown on white"):
        seen = np.asarray(open_image(path))
    assert (seen[:, 4:] == 255).all()
    left = np.asarray(Image.open(path).convert("RGB"))[:, :4]
    np.testing.assert_array_equal(seen[:, :4], left)


def test_opaque_pictures_say_nothing(tmp_path, recwarn):
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "a.png")
    open_image(tmp_path / "a.png")
    assert not recwarn.list


def test_commands_warn_in_one_line(capsys):
    shown = warnings.showwarning
    with one_line_errors():
        warnings.warn("two\n  lines", stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("videos", "size", "gap", "want"),
    [
        (1, (192, 192), 8, 1), (20, (192, 192), 8, 20), (21, (192, 192), 8, 11), (90, (192, 192), 8, 18),
        (400, (192, 192), 8, 20), (4, (832, 480), 0, 4), (5, (832, 480), 0, 3), (32, (832, 480), 0, 4),
        (1, (4096, 4096), 0, 1),
    ],
)  # fmt: skip
def test_grids_fit_a_file(videos, size, gap, want):
    n = columns(videos, size, gap)
    assert n == want
    rows = -(-videos // n)
    for count, side in ((n, size[0]), (rows, size[1])):
        assert count * (side + gap) - gap <= MAX_SIDE


def test_more_videos_than_a_file_holds():
    for videos, size, fit in ((401, (192, 192), 400), (33, (832, 480), 32)):
        with pytest.raises(ValueError, match=rf"{videos} videos of {size[0]}x{size[1]} do not fit .*, {fit} do"):
            columns(videos, size, 8 if size == (192, 192) else 0)
    with pytest.raises(ValueError, match="a video of 8192x16 pixels does not fit a file: .* 4096"):
        columns(1, (8192, 16), 0)


def test_tiles_are_one_row_until_it_is_too_wide():
    videos = np.random.default_rng(0).integers(0, 255, (5, 2, 4, 1000, 3), np.uint8)
    np.testing.assert_array_equal(tiled(videos[:4], gap=1), grid([videos[:4]], gap=1))
    wrapped = tiled(videos, gap=1)
    assert wrapped.shape == (2, 9, 3002, 3)
    np.testing.assert_array_equal(wrapped[:, 5:, 1001:2001], videos[4])
    assert (wrapped[:, 5:, 2002:] == 255).all()
    assert tiled(videos[:3], scale=2, gap=1).shape == (2, 9, 2001, 3)
