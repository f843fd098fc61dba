"""Edited weights of single blocks, kept in files of their own until the last model that reads them is gone.

A skeleton reads its weights from a checkpoint that no edit may touch. What an edit changes is therefore written
here, to the folder for temporary files, and read from here instead.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from secateur.models.scratch import require_room


class EditedPart:
    """Tensors of one part of a model (a block, or what is outside the blocks), in a file.

    The file is removed with the object. Names are relative to the part: `mlp.down_proj.weight` in a block.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors.

        Raises:
            OSError: there is no room for them.
        """
        folder = Path(tempfile.mkdtemp(prefix="secateur-edited-"))
        self._removal = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        require_room(folder, needed, "edited weights")
        self.file = folder / "part.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, self.file)
