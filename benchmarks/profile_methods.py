"""Where the time of every method goes, and what its estimate announced: processor seconds on one thread.

    python benchmarks/profile_methods.py MODEL TEXT.txt [METHOD …] [--windows N] [--length N] [--remove SHARE]

MODEL is a folder, a GGUF file, or the name of a shape: a Llama of random parameters. `llama-1b` (1.2 billion, bfloat16)
is written once to a temporary folder and opened as a skeleton, `llama-30m` is in memory. Seconds are split by what was
called: blocks and what is before and after them, passes backwards, sums over tokens (products of inputs, similarities),
solving (decompositions, greedy choices), the disk (weights of a skeleton, states that do not fit in memory), and the
rest. The estimate is measured by the same clock.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import keep, peak
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.jobs.plan import PlanJob
from secateur.jobs.prune import PruneJob
from secateur.methods.method import METHODS
from secateur.models.decoder import Decoder

SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-30m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}
KINDS: dict[str, tuple[str, ...]] = {
    "forward": (
        "secateur.models.forward.run_block",
        "secateur.models.forward.capture",
        "secateur.models.forward.final_states",
        "secateur.calibration.walk.loss_sum",
        "secateur.scores.divergence.OutputChange.__call__",
        "secateur.scores.divergence.mean_distances",
    ),
    "backward": ("torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward"),
    "sums": (
        "secateur.calibration.inputs.InputSums.update",
        "secateur.calibration.statistics.CosineSums.update",
        "secateur.calibration.statistics.AngularSums.update",
        "secateur.calibration.statistics.CkaSums.update",
        "secateur.calibration.statistics.LinearSums.update",
        "secateur.surgery.hidden.directions.Covariance.update",
        "secateur.surgery.hidden.directions.Reconstruction.update",
        "secateur.calibration.products.mirror_upper",
    ),
    "solve": (
        "secateur.surgery.width.repair.choose_fit",
        "secateur.surgery.width.repair.rewritten",
        "secateur.scores.unit_scores.removal_order",
        "secateur.scores.unit_scores.cheapest_to_lose",
        "secateur.surgery.hidden.directions.principal_directions",
        "secateur.surgery.hidden.directions.sensitive_directions",
        "secateur.surgery.hidden.directions.times",
        "secateur.calibration.statistics.LinearSums.result",
        "secateur.calibration.statistics.LinearSums.best_ridge",
        "secateur.calibration.statistics.LinearSums.held_out_error",
        "secateur.surgery.hidden.directions.Reconstruction.reading",
        *(f"torch.linalg.{name}" for name in ("eigh", "eigvalsh", "inv", "solve", "cholesky", "qr", "svd", "lstsq")),
    ),
    "disk": (
        "secateur.models.shards.Shards.load",
        "secateur.models.shards.Shards.with_part",
        "secateur.calibration.store.StateStore._write",
        "secateur.calibration.store.StateStore.get",
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {"streamline": {"network": "none"}}
NOT_HERE = {"auto", "reap", "ream", "expert-frequency", "expert-activation"}
"""A search over other methods, and what only mixtures of experts have."""


class Clock:
    """Processor seconds by kind; what a function of one kind calls counts as that kind."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its time counted."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, begin = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[kind] += time.process_time() - begin

        return run


def holder_of(path: str) -> tuple[Any, str]:
    """Return the module or class that holds a function, and its name there."""
    owner, _, name = path.rpartition(".")
    module = owner if owner in sys.modules else owner.rpartition(".")[0]
    __import__(module)
    holder = sys.modules[module]
    return (holder if owner == module else getattr(holder, owner.rpartition(".")[2])), name


@contextmanager
def measuring(clock: Clock) -> Iterator[None]:
    """Count the seconds of every function of a kind, in whatever module it is known."""
    before: list[tuple[Any, str, Any]] = []
    modules = [one for name, one in sys.modules.items() if name.startswith("secateur")]
    for kind, paths in KINDS.items():
        for path in paths:
            holder, name = holder_of(path)
            original = getattr(holder, name)
            counted = clock.timed(kind, original)
            places = [(holder, name)]
            if isinstance(holder, types.ModuleType):
                places += [(one, key) for one in modules for key, value in vars(one).items() if value is original]
            for place, key in places:
                before.append((place, key, original))
                setattr(place, key, counted)
    try:
        yield
    finally:
        for place, key, original in before:
            setattr(place, key, original)


def random_model(shape: str) -> Decoder:
    """Open a Llama of random parameters; the larger one is written on first use."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)
    if shape != "llama-1b":
        return secateur.open_model(LlamaForCausalLM(config).eval())
    folder = Path(tempfile.gettempdir()) / f"secateur-{shape}"
    if not (folder / "config.json").is_file():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return secateur.open_model(folder, skeleton=True)


def profile(model: Decoder, windows: Windows, name: str, remove: float) -> dict[str, Any]:
    """Plan and prune by one method; what it took, by kind, and what was announced."""
    clock, wall = Clock(), time.perf_counter
    time.perf_counter = time.process_time  # the clock of the estimate
    try:
        job = PlanJob.prepare(model, method=name, texts=windows, remove=remove, settings=SETTINGS.get(name))
        announced = {phase.name: phase.seconds for phase in job.cost().phases}
        begin = time.process_time()
        with measuring(clock):
            plan = job.run()
            planned = time.process_time()
            PruneJob.prepare(model, plan, texts=windows).run()
        ended = time.process_time()
    finally:
        time.perf_counter = wall
    happened = {"plan": planned - begin, "apply": ended - planned}
    seconds = {kind: clock.seconds[kind] for kind in KINDS}
    seconds["other"] = ended - begin - sum(seconds.values())
    rounded = {
        key: {part: round(value, 2) for part, value in of.items()}
        for key, of in {"announced": announced, "happened": happened, "seconds": seconds}.items()
    }
    total = sum(happened.values())
    return rounded | {
        "announced_over_happened": round(sum(announced.values()) / max(total, 0.01), 2),
        "removed": round(1 - plan.parameters_after / plan.parameters_before, 4),
        "peak_bytes": peak(),
    }


def main() -> None:
    """Profile the methods asked for, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", help="of what is calibrated on; random models read random tokens")
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--remove", type=float, default=0.1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    METHODS.load()
    if given.model in SHAPES:
        model = random_model(given.model)
        vocabulary = SHAPES[given.model]["vocab_size"]
        windows = Windows.of(torch.randint(0, vocabulary, (given.windows, given.length)))
    else:
        model = secateur.open_model(given.model)
        windows = windows_for(model, given.text, windows=given.windows, seq_len=given.length)
    for name in given.methods or [one for one in METHODS if one not in NOT_HERE]:
        setting = {"model": Path(given.model).stem, "method": name, "windows": len(windows), "seq_len": given.length}
        try:
            found = profile(model, windows, name, given.remove)
        except InputError as error:
            found = {"refused": str(error)}
        keep("profile_methods", setting | {"remove": given.remove}, found)


if __name__ == "__main__":
    main()
