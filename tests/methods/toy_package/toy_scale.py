"""A method in a package of its own: it scales what the MLPs of the last blocks write."""

from typing import Literal

from pydantic import Field

from secateur.methods.budget import Budget
from secateur.methods.method import Measurements, MethodSettings, applies, method
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.plan.step import Sizes, Step
from secateur.plan.units import BlockChange
from secateur.surgery.depth.blocks import with_block_tensors


class ScaleMlp(Step):
    kind: Literal["toy-scale"] = "toy-scale"
    blocks: tuple[int, ...]
    factor: float

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        return tuple(range(count))

    def sizes_after(self, sizes: Sizes) -> Sizes:
        return sizes

    def describe(self) -> tuple[str, str]:
        return "scales", f"the MLPs of {', '.join(map(str, self.blocks))} by {self.factor:g}"

    def block_changes(self, sizes: Sizes, numbers: list[int]) -> dict[int, BlockChange]:
        change = BlockChange(state="changed", text=f"MLP output times {self.factor:g}")
        return dict.fromkeys(self.blocks, change)


class ToySettings(MethodSettings):
    factor: float = Field(0.5, description="what MLP outputs are multiplied by")


@method(
    name="toy",
    summary="scale what the MLPs of the last blocks write",
    paper="nobody 2026, Toys",
    settings=ToySettings,
    needs_texts=lambda _: False,
)
def decide(measurements: Measurements, settings: ToySettings, budget: Budget) -> tuple[ScaleMlp, ...]:
    count = measurements.decoder.block_count
    share = budget.value / count if budget.aim == "blocks" else budget.value
    blocks = tuple(range(count - round(share * count), count))
    return (ScaleMlp(method="toy", settings=settings.model_dump(), blocks=blocks, factor=settings.factor),)


@applies(ScaleMlp)
def apply(measurements: Measurements, step: ScaleMlp) -> Decoder:
    decoder, edits = measurements.decoder, []
    for index in step.blocks:
        with decoder.block(index) as block:
            tensors = {name: one.detach().clone() for name, one in block.named_parameters()}
            writer = next(path for path in decoder.anatomy.family.mlp_out if find(block, path) is not None)
        edits.append((index, {n: one * step.factor if n.startswith(writer) else one for n, one in tensors.items()}))
    return with_block_tensors(decoder, edits, {"toy": [list(step.blocks), step.factor]})
