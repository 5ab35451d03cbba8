"""Upscaling: noise out, Lanczos, edges back in."""

from __future__ import annotations

import cv2
from cv2.typing import MatLike

from service.sandbox.forms import Options
from service.sandbox.imaging import picture


def upscale(image: MatLike, options: Options) -> MatLike:
    """Give the image enlarged by `upscale`.

    `s_noise` smooths more before the enlargement, unless `high_fidelity` leaves the source as it is; `steps` sharpens
    more behind it; `strong_inpaint` smooths wounds away and lifts what is left, as much as its intensity says.

    Raises:
        RejectedError: the result would have too many pixels.

    """
    height, width = image.shape[:2]
    size = picture.bounded(width * options.upscale, height * options.upscale)
    colours, alpha = picture.split_alpha(image)
    if not options.high_fidelity:
        colours = cv2.bilateralFilter(colours, 5, 12 + 200 * (options.s_noise - 1), 3)
    if options.strong_inpaint:
        mended = picture.lift_contrast(cv2.medianBlur(colours, 3), 1.5)
        share = options.strong_inpaint_intensity
        colours = cv2.addWeighted(mended, share, colours, 1 - share, 0)
    colours = cv2.resize(colours, size, interpolation=cv2.INTER_LANCZOS4)
    colours = picture.sharpen(colours, 0.6 + 0.4 * options.upscale, 0.4 + (options.steps - 20) / 40)
    if alpha is not None:
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_LINEAR)
    return picture.join_alpha(colours, alpha)
