"""The stages, in pipeline order. One straight-line file each; one name for command, file, recipe section and folder."""

from types import MappingProxyType

from lasar.artifacts import StageModule
from lasar.stages import (
    anchor,
    blend,
    embed,
    evaluate,
    explicit_cot,
    gru4rec,
    latent_sft,
    prepare,
    quantize,
    rationalize,
    rearec,
    report,
    rl,
    sasrec,
    sft,
    tiger,
)

STAGES: MappingProxyType[str, StageModule] = MappingProxyType(
    {
        "prepare": prepare,
        "embed": embed,
        "quantize": quantize,
        "rationalize": rationalize,
        "sft": sft,
        "anchor": anchor,
        "latent_sft": latent_sft,
        "explicit_cot": explicit_cot,
        "gru4rec": gru4rec,
        "sasrec": sasrec,
        "rearec": rearec,
        "tiger": tiger,
        "rl": rl,
        "blend": blend,
        "evaluate": evaluate,
        "report": report,
    }
)

# Run only where a recipe lists them: systems to compare with.
BASELINES = ("explicit_cot", "gru4rec", "sasrec", "rearec", "tiger")
