"""What Stage 1 trains one after the other: new rows alone, texts and histories, then histories."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lasar.model.backbone import Backbone
from lasar.model.new_rows import num_new_weights, only_new_rows
from lasar.training.estimate import Phase
from lasar.training.fit import FitPlan, SizedBatch


def stage1_phases(
    plan: FitPlan,
    *,
    new_rows_first: int,
    align_first: int,
    backbone: Backbone,
    batches: Callable[[int, bool], Sequence[SizedBatch]],
) -> list[Phase]:
    """The trainings of Stage 1, in their order; the last is the one whose best epoch is kept.

    Args:
        plan: of the last.
        new_rows_first: epochs that train the embeddings of LASAR's own tokens alone.
        align_first: epochs with texts, after which there are none; 0: texts, if any, stay.
        backbone: what is trained.
        batches: epoch, and whether with texts, to batches.
    """
    phases = []
    if new_rows_first:
        new = Phase(
            name="sft_new_rows", batches=lambda epoch: batches(epoch, True),
            plan=replace(plan, epochs=new_rows_first, weight_decay=0.0),  # it would move old rows, too
            scope=lambda: only_new_rows(backbone.model, backbone.vocabulary),
            moving=num_new_weights(backbone.model, backbone.vocabulary),
        )  # fmt: skip
        phases.append(new)
    if align_first:
        align = replace(plan, epochs=align_first)
        phases.append(Phase(name="sft_align", plan=align, batches=lambda epoch: batches(epoch, True)))
    return [*phases, Phase(name="sft", plan=plan, batches=lambda epoch: batches(epoch, not align_first))]
