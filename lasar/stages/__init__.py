"""The stages, in pipeline order. One straight-line file each; one name for command, file, recipe section and folder."""

from types import MappingProxyType

from lasar.artifacts import StageModule
from lasar.stages import embed, evaluate, prepare, quantize, report, sft

STAGES: MappingProxyType[str, StageModule] = MappingProxyType(
    {
        "prepare": prepare,
        "embed": embed,
        "quantize": quantize,
        "sft": sft,
        "evaluate": evaluate,
        "report": report,
    }
)
