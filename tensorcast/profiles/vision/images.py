"""From an image's pixels to patches of a tower and tokens of a language model, as image processors resize and cut.

One rule per kind of processor; its numbers are those of a model's ``preprocessor_config.json``. Sides are in pixels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from tensorcast.errors import InputError
from tensorcast.profiles.sourced import Frozen


class View(NamedTuple):
    """So many pictures that the tower gets, each of ``patches``."""

    number: int
    patches: int


class EncodedImage(NamedTuple):
    """What an image is to a model: ``views`` for its tower, ``tokens`` of its prompt, of which ``embeddings`` come from
    the tower."""

    views: tuple[View, ...]
    tokens: int
    embeddings: int

    @property
    def patches(self) -> int:
        return sum(view.number * view.patches for view in self.views)


class _Rule(Frozen):
    source: str = Field(default="", description="where its numbers are from")

    def encoded(self, width: int, height: int) -> EncodedImage:
        """Of an image of these pixels. Raises :class:`InputError` where the processor refuses it."""
        raise NotImplementedError


class Grid(_Rule):
    """Sides rounded to whole tokens, the area between two limits (Qwen2VLImageProcessor and those made of it)."""

    rule: Literal["grid"] = "grid"
    patch: int = Field(gt=0)
    merge: int = Field(gt=0, description="patches on a side of a token")
    least_pixels: int = Field(gt=0)
    most_pixels: int = Field(gt=0)
    frame_tokens: int = Field(default=2, ge=0, description="around an image: where it starts and ends")

    def encoded(self, width: int, height: int) -> EncodedImage:
        if max(width, height) > 200 * min(width, height):
            raise InputError(f"--image-size {width}x{height}: the processor takes no image 200 times as long as wide")
        side = self.patch * self.merge
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self.most_pixels:
            shrink = math.sqrt(height * width / self.most_pixels)
            rows, columns = (max(1, math.floor(pixels / shrink / side)) for pixels in (height, width))
        elif rows * columns * side**2 < self.least_pixels:
            grow = math.sqrt(self.least_pixels / (height * width))
            rows, columns = (math.ceil(pixels * grow / side) for pixels in (height, width))
        tokens = rows * columns
        return EncodedImage((View(1, tokens * self.merge**2),), tokens + self.frame_tokens, tokens)


class Limited(_Rule):
    """Never made larger; padded to whole tokens (Kimi_K25ImageProcessor)."""

    rule: Literal["limited"]
    patch: int = Field(gt=0)
    merge: int = Field(gt=0)
    most_patches: int = Field(gt=0)
    most_side_patches: int = Field(gt=0)
    frame_tokens: int = Field(default=2, ge=0)

    def encoded(self, width: int, height: int) -> EncodedImage:
        patches = max(1, height // self.patch) * max(1, width // self.patch)
        limit = self.most_side_patches * self.patch
        scale = min(1.0, math.sqrt(self.most_patches / patches), limit / height, limit / width)
        rows, columns = (
            math.ceil(min(max(1, int(pixels * scale)), limit) / (self.patch * self.merge)) for pixels in (height, width)
        )
        tokens = rows * columns
        return EncodedImage((View(1, tokens * self.merge**2),), tokens + self.frame_tokens, tokens)


class Pooled(_Rule):
    """As large as a budget of tokens lets it be; the tower gets the whole budget, padded (Gemma4ImageProcessor)."""

    rule: Literal["pooled"]
    patch: int = Field(gt=0)
    pool: int = Field(gt=0, description="patches on a side of a token")
    most_tokens: int = Field(gt=0)
    frame_tokens: int = Field(default=2, ge=0)

    def encoded(self, width: int, height: int) -> EncodedImage:
        side, most = self.patch * self.pool, self.most_tokens * self.pool**2
        scale = math.sqrt(most * self.patch**2 / (height * width))
        rows, columns = (math.floor(pixels * scale / side) for pixels in (height, width))
        if not rows and not columns:
            raise InputError(f"--image-size {width}x{height}: the processor makes nothing of it")
        if not rows:
            rows, columns = 1, min(width // height, self.most_tokens)
        elif not columns:
            rows, columns = min(height // width, self.most_tokens), 1
        tokens = rows * columns
        return EncodedImage((View(1, most),), tokens + self.frame_tokens, tokens)


class Tiles(_Rule):
    """Square tiles on the canvas that fits best, and one of the whole image beside several (Llama4ImageProcessor)."""

    rule: Literal["tiles"]
    tile: int = Field(gt=0, description="pixels on a side")
    patch: int = Field(gt=0)
    most_tiles: int = Field(gt=0)
    tile_tokens: int = Field(gt=0)
    frame_tokens: int = Field(default=3, ge=0, description="start, image and end")

    def encoded(self, width: int, height: int) -> EncodedImage:
        def scale(rows: int, columns: int) -> float:
            # in the numbers and the precision of the processor, which compares float32
            return min(_float32(columns * self.tile / width), _float32(rows * self.tile / height))

        canvases = [*self._canvases()]
        scales = {canvas: scale(*canvas) for canvas in canvases}
        larger = [value for value in scales.values() if value >= 1]
        chosen = min(larger) if larger else max(scales.values())
        rows, columns = min(
            (canvas for canvas in canvases if scales[canvas] == chosen), key=lambda canvas: canvas[0] * canvas[1]
        )
        tiles = rows * columns + (rows * columns > 1)
        apart = rows * columns if rows * columns > 1 else 0  # a separator behind each tile
        patches = (self.tile // self.patch) ** 2
        embeddings = tiles * self.tile_tokens
        return EncodedImage((View(tiles, patches),), embeddings + apart + self.frame_tokens, embeddings)

    def _canvases(self) -> Iterator[tuple[int, int]]:
        by_ratio: dict[float, list[tuple[int, int]]] = {}
        for tiles in range(self.most_tiles, 0, -1):
            for rows in range(1, tiles + 1):
                if tiles % rows == 0:
                    by_ratio.setdefault(rows * rows / tiles, []).append((rows, tiles // rows))
        for canvases in by_ratio.values():
            yield from canvases


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


class Views(_Rule):
    """The whole image in one size, and windows of it in another (Step3p7ImageProcessor)."""

    rule: Literal["views"]
    whole: int = Field(gt=0, description="pixels on a side of the whole")
    window: int = Field(gt=0)
    most_side: int = Field(gt=0)
    patch: int = Field(gt=0)
    stride: int = Field(gt=0, description="patches on a side of a token")
    frame_tokens: int = Field(default=2, ge=0, description="around each of them")

    def encoded(self, width: int, height: int) -> EncodedImage:
        windows, newlines = self._windows(width, height)
        views = [View(1, self._patches(self.whole))]
        embeddings = self._tokens(self.whole) + windows * self._tokens(self.window)
        if windows:
            views.append(View(windows, self._patches(self.window)))
        return EncodedImage(tuple(views), embeddings + self.frame_tokens * (1 + windows) + newlines, embeddings)

    def _patches(self, side: int) -> int:
        return (side // self.patch) ** 2

    def _tokens(self, side: int) -> int:
        return (side // (self.patch * self.stride)) ** 2

    def _windows(self, width: int, height: int) -> tuple[int, int]:
        """Windows, and lines that end before the last."""
        if min(width, height) < 32 and max(width, height) > 4 * min(width, height):
            width = height = max(width, height)
        if max(width, height) > self.most_side:
            scale = self.most_side / max(width, height)
            width, height = int(width * scale), int(height * scale)
        short, long = sorted((width, height))
        side = self.window
        if long <= self.whole:
            if long <= 1.5 * short:
                return 0, 0
            side = short
        elif long > 4 * short:
            side = min(short, self.window)
        columns, rows = (
            max(1, pixels // side + (pixels % side > 0.2 * side)) if pixels >= side else 1 for pixels in (width, height)
        )
        return rows * columns, rows - 1


class LongestSide(_Rule):
    """Made smaller to a longest side, padded to whole tokens, a token behind each line (PixtralImageProcessor)."""

    rule: Literal["longest_side"]
    patch: int = Field(gt=0)
    merge: int = Field(default=1, gt=0)
    longest: int = Field(gt=0, description="pixels")

    def encoded(self, width: int, height: int) -> EncodedImage:
        ratio = max(height / self.longest, width / self.longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        side = self.patch * self.merge
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        embeddings = rows * columns
        return EncodedImage((View(1, embeddings * self.merge**2),), embeddings + rows, embeddings)


ImageRule = Annotated[Grid | Limited | Pooled | Tiles | Views | LongestSide, Field(discriminator="rule")]


def parse_image_size(text: str) -> tuple[int, int]:
    """``1280x720`` -> width and height. Raises :class:`InputError`."""
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdigit() or not height.isdigit() or not int(width) or not int(height):
        raise InputError(f"--image-size {text}: must be width x height in pixels, such as 1280x720")
    return int(width), int(height)
