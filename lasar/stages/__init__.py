"""The stages, in pipeline order. One straight-line file each; one name for command, file, recipe section and folder."""

from types import MappingProxyType

from lasar.artifacts import StageModule
from lasar.stages import anchor, embed, evaluate, latent_sft, prepare, quantize, rationalize, report, sft

STAGES: MappingProxyType[str, StageModule] = MappingProxyType(
    {
        "prepare": prepare,
        "embed": embed,
        "quantize": quantize,
        "rationalize": rationalize,
        "sft": sft,
        "anchor": anchor,
        "latent_sft": latent_sft,
        "evaluate": evaluate,
        "report": report,
    }
)
