"""In which precision matrices are multiplied: what `auto` means for a model on the machine at hand."""

import logging
import statistics
import time
from functools import lru_cache
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["fp32", "bf16", "auto"]

logger = logging.getLogger(__name__)

_ROWS = 512  # tokens of the product that is timed
_ROUNDS = 5
_WORTH = 1.25  # bf16 is taken when it is faster by this much: nearly as fast is not worth its rounding
_SLOW = 0.8  # bf16 that somebody asked for is warned of when it is slower than this


def choose_precision(wanted: PrecisionChoice, model: nn.Module, *, narrowest: int = 0) -> Precision:
    """What `auto` means: bf16 where matrix products of this model's width are faster in it, else fp32.

    A processor that has instructions for bf16 may still be faster without them, so on a CPU both are timed once (some
    hundredths of a second); a GPU that supports bf16 is faster in it.

    Args:
        wanted: a precision is what it is; of bf16 that is slow here there is a warning.
        model: has weights that are matrices.
        narrowest: width below which `auto` is fp32.
    """
    if wanted == "fp32":
        return wanted
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    width = round(statistics.median(min(matrix.shape) for matrix in matrices)) if matrices else 0
    if wanted == "bf16":
        if width and not matrices[0].is_cuda:
            _warn_if_slow(width)
        return wanted
    if not width or width < narrowest:
        return "fp32"
    if matrices[0].is_cuda:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if bf16_speed(width) >= _WORTH else "fp32"


@lru_cache  # once, however often a stage asks
def _warn_if_slow(width: int) -> None:
    speed = bf16_speed(width)
    if speed < _SLOW:
        logger.warning(
            "precision=bf16: this processor is %.1f times slower in it than in fp32; set auto", 1 / speed
        )


@lru_cache
def bf16_speed(width: int) -> float:
    """How many times as fast this CPU multiplies tokens by a matrix in bf16 as in fp32, casting the tokens first.

    Args:
        width: of a token; the matrix is four times as high.
    """
    x_TD, matrix_XD = torch.ones(_ROWS, width), torch.ones(4 * width, width)  # zeros may share memory
    half_XD = matrix_XD.bfloat16()
    best = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):  # the first round warms up: a best time forgets it
            start = time.perf_counter()
            functional.linear(x_TD, matrix_XD)
            middle = time.perf_counter()
            functional.linear(x_TD.bfloat16(), half_XD)
            end = time.perf_counter()
            best = {"fp32": min(best["fp32"], middle - start), "bf16": min(best["bf16"], end - middle)}
    return best["fp32"] / best["bf16"]
