"""Apply a step of slicing, with a basis at every reading point or with shared ones."""

from __future__ import annotations

from secateur.errors import InputError
from secateur.methods.method import Measurements, applies
from secateur.models.decoder import Decoder
from secateur.plan.hidden import SliceHidden
from secateur.surgery.hidden.folding import folded_config, stream_sizes
from secateur.surgery.hidden.invariance import require_invariance
from secateur.surgery.hidden.own_bases import slice_by_principal_directions
from secateur.surgery.hidden.shared_basis import find_bases, find_coordinates, slice_with_shared_bases
from secateur.surgery.hidden.stock import stock_stream_sizes
from secateur.surgery.hidden.stream_trial import with_stream


@applies(SliceHidden)
def apply(measurements: Measurements, step: SliceHidden) -> Decoder:
    """Slice as the step says; bases are measured on the texts, after a check that rotation alone changes nothing.

    Raises:
        InputError: the step was made for a model of another shape.
        ModelError: the family cannot be sliced.
    """
    decoder = with_stream(measurements.decoder) if step.stock else measurements.decoder
    sizes = stock_stream_sizes(decoder) if step.stock else stream_sizes(folded_config(decoder))
    if sizes != step.sizes:
        raise InputError("this slicing step was made for a model of another shape; make a new plan for this one.")
    if decoder.anatomy.family.stream is None:  # else the trial that found it has shown this
        require_invariance(decoder)
    windows = measurements.need_windows()
    if step.bases is None:
        return slice_by_principal_directions(
            decoder, windows, step.widths, step.head_width, signals=step.signals, options=measurements.options
        )[0]
    if step.coordinates:
        bases = find_coordinates(decoder, windows, step.head_width, options=measurements.options)
    else:
        bases = find_bases(
            decoder,
            windows,
            step.head_width,
            step.bases,
            signals=step.signals,
            sensitivity=step.sensitivity,
            options=measurements.options,
        )
    return slice_with_shared_bases(
        decoder,
        windows,
        bases,
        stock=step.stock,
        reconstruct=step.reconstruct,
        options=measurements.options,
    )
