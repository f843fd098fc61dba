"""The training loop, on Accelerate, for healing recipes and for modules that replace blocks.

The loop trains an objective: a module whose forward takes a batch and returns a sum of losses and its number of terms.
It depends on no model and no method. It splits the windows of each optimiser step over the processes, runs them in
micro-batches that fit in memory, normalises by the number of terms in the whole step (so one process and several give
the same gradient), evaluates on held-out data, keeps the best state, stops early, and saves a state to resume from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    broadcast_object_list,
    release_memory,
)
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from secateur.errors import InputError, NumericsError, unknown
from secateur.modeling import SecateurExperts
from secateur.progress import Progress
from secateur.run_options import DEFAULTS, RunOptions
from secateur.training.run_folder import RunFolder, read
from secateur.training.settings import Outcome, Status, StopReason, TrainingSettings
from secateur.training.sharding import shard, sharding_asked, sync_gradients, whole

Batch = dict[str, torch.Tensor]
Sums = tuple[torch.Tensor, torch.Tensor]
"""Sum of losses and number of terms."""

_TOKENS_PER_FORWARD = {"cpu": 4096, "cuda": 16384}
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Experiment trackers that receive the curves, besides the log.

    Attributes:
        trackers: names known to Accelerate: tensorboard, mlflow, wandb.
        folder: where they write.
    """

    trackers: tuple[str, ...] = ()
    folder: Path | None = None


UNTRACKED = Tracking()


TRACKERS = ("tensorboard", "mlflow", "wandb")


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that cannot be used.

    Raises:
        InputError: a tracker that is unknown or not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, list(TRACKERS))
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'secateur[{name}]'.")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Identity of a training run, separate from its settings.

    Attributes:
        recipe: data that distinguish this run from others; settings and seed are added.
        what: description shown by the progress bar.
        units: parts of the module, such as blocks, that are gathered one by one if the launcher asked for sharding
            (FSDP2); afterwards the module's parameters stay sharded (`sharding.whole_parameters`).
        tracking: experiment trackers.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    what: str = "training"
    units: Sequence[nn.Module] = ()
    tracking: Tracking = UNTRACKED


def accelerator_for(
    objective: nn.Module,
    device: torch.device,
    settings: TrainingSettings,
    seed: int = 0,
    tracking: Tracking = UNTRACKED,
) -> Accelerator:
    """Return the accelerator of a run; under `accelerate launch` it spans all processes."""
    AcceleratorState._reset_state()  # otherwise the precision of an earlier run in this process would persist
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where Accelerate puts what it moves
    idle_experts = any(isinstance(module, SecateurExperts) for module in objective.modules())
    return Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if idle_experts else None,
        mixed_precision="bf16" if settings.autocasts(device) else "no",
        cpu=device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed),
        log_with=list(tracking.trackers) or None,
        project_dir=tracking.folder,
    )


def train(
    objective: nn.Module,
    data: Dataset[Batch],
    held_out: Dataset[Batch],
    settings: TrainingSettings,
    run: TrainingRun,
    *,
    device: torch.device,
    options: RunOptions = DEFAULTS,
) -> Outcome:
    """Train the parameters of a module that require gradients; afterwards it holds the best state seen.

    Args:
        objective: on `device`; its forward takes a batch by names and returns (sum of losses, number of terms).
        data: indexed items, dicts of tensors of equal shapes; each has `tokens` (T,).
        held_out: items of the same kind that are never trained on.
        settings: the training settings.
        run: what identifies the run, its description, and its trackers.
        device: device to train on.
        options: the random seed, also of the order of the data; the work folder in which the run saves its state (a
            folder with a state of the same run resumes it; None saves nothing beyond the call).

    Raises:
        InputError: too little data, or the folder holds another run.
        NumericsError: the loss became NaN or infinite before any improvement.
    """
    folder, seed = options.work, options.seed
    if sharding_asked() and run.units:
        shard(objective, run.units)
    accelerator = accelerator_for(objective, device, settings, seed, run.tracking)
    recipe = run.recipe | {"training": settings.model_dump(), "seed": seed}
    made: list[RunFolder | None] = [None]
    if accelerator.is_main_process:
        made = [RunFolder(folder, recipe)]
    if accelerator.num_processes > 1:
        path = [made[0].path if made[0] else None]
        broadcast_object_list(path)
        made = [made[0] or RunFolder(path[0], recipe, writes=False)]
    states = made[0]
    assert states is not None
    states.lasting = folder is not None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed + accelerator.process_index)
        return _Run(objective, data, held_out, settings, accelerator, states, run, options.progress).train()


class _Run:
    """A run in progress."""

    def __init__(
        self,
        objective: nn.Module,
        data: Dataset[Batch],
        held_out: Dataset[Batch],
        settings: TrainingSettings,
        accelerator: Accelerator,
        folder: RunFolder,
        run: TrainingRun,
        progress: Progress,
    ) -> None:
        self.accelerator, self.folder, self.settings, self.progress = accelerator, folder, settings, progress
        self.status, self.tracked = Status(run.what), bool(run.tracking.trackers)
        self.held_out = held_out
        available = _length(data)
        self.batch_size = settings.windows_per_step(available, accelerator.num_processes)
        steps = available // self.batch_size * settings.epochs
        if steps < 1 or _length(held_out) < 1:
            raise InputError(
                f"{available} windows to train on and {_length(held_out)} held out are too few for steps of "
                f"{self.batch_size} windows; give more text, or a smaller batch size."
            )
        self.outcome = Outcome(planned=steps)
        self.module = objective if isinstance(objective, FSDPModule) else accelerator.prepare_model(objective)
        self.parameters = [one for one in self.module.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer,
            num_warmup_steps=round(settings.warmup * steps),
            num_training_steps=steps,
            min_lr=min(settings.final_learning_rate, settings.learning_rate),
        )
        loader = DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=default_collate,
            generator=torch.Generator(),  # otherwise a resumed run would draw once more from dropout's
        )
        self.loader = accelerator.prepare_data_loader(loader)
        self.exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        length = data[0]["tokens"].shape[0]
        fitting = max(1, _TOKENS_PER_FORWARD.get(accelerator.device.type, 4096) // length)
        self.micro = settings.micro_batch or fitting

    def train(self) -> Outcome:
        """Train to the end, from the beginning or from a saved state."""
        outcome, accelerator = self.outcome, self.accelerator
        if self.tracked:
            accelerator.init_trackers("secateur", config=self.settings.model_dump(exclude_none=True))
        self._resume()
        if outcome.steps == 0:
            self._evaluate()
        count = self.settings.evaluations
        evaluated_after = {round(one * outcome.planned / count) for one in range(1, count + 1)}
        saved = time.monotonic()
        remaining = outcome.planned - outcome.steps
        for batch in self.progress(self._batches(), self.status, remaining):
            if outcome.stopped or not self._step(batch):
                break
            if outcome.steps in evaluated_after:
                self._evaluate()
            if self._all_agree(time.monotonic() - saved > 60 * self.settings.save_minutes):
                self._save()
                saved = time.monotonic()
        if outcome.stop_reason == "nan" and outcome.best_step == 0:
            raise NumericsError(f"training {outcome.stopped}, before any improvement; try a lower learning rate.")
        if self.folder.lasting:
            self._save()
        self._take_best()
        outcome.curve = self.folder.log_entries()
        if self.tracked:
            for tracker in accelerator.trackers:  # `end_training` would end the other processes' group, too
                tracker.finish()
        accelerator.wait_for_everyone()
        return outcome

    def _batches(self) -> Iterator[Batch]:
        """Yield the remaining batches of the epochs, in the order given by the seed."""
        each = self.outcome.planned // self.settings.epochs
        begun, done = divmod(self.outcome.steps, each)
        for epoch in range(begun, self.settings.epochs):
            loader = self.accelerator.skip_first_batches(self.loader, done) if done else self.loader
            loader.set_epoch(epoch)
            yield from loader
            done = 0

    def _step(self, batch: Batch) -> bool:
        """Take one optimiser step; return False if the loss or the gradient is NaN or infinite."""
        started, rate = time.monotonic(), self.schedule.get_last_lr()[0]
        total, terms = self._fitting(lambda: self._accumulate(batch))
        sums = self.accelerator.reduce(torch.stack((total, terms)), reduction="sum")
        loss, counted = float(sums[0] / sums[1]), float(sums[1])
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.accelerator.num_processes / counted)
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)))
        self.outcome.steps += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop("nan", "the loss or its gradient is NaN or infinite")
            return False
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = batch["tokens"].numel() * self.accelerator.num_processes
        self.outcome.tokens += tokens
        speed = tokens / max(time.monotonic() - started, 1e-9)
        self.status.now = f": loss {loss:.4f}, {speed:,.0f} tokens/s"
        self._log({"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens_per_second": round(speed)})
        return True

    def _fitting(self, measure: Callable[[], Sums]) -> Sums:
        """Run a measurement, repeating it with smaller micro-batches if memory runs out.

        Raises:
            InputError: memory runs out with a single window, or in a multi-process run.
        """
        while True:
            try:
                return measure()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.micro = min(self.micro, self.batch_size // self.accelerator.num_processes)
                if self.micro == 1 or self.accelerator.num_processes > 1:
                    raise InputError(
                        f"out of memory with micro_batch={self.micro}; take fewer windows per forward, shorter "
                        "windows, or a recipe that trains fewer weights."
                    ) from error
                self.micro //= 2
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()

    def _accumulate(self, batch: Batch) -> Sums:
        """Sum losses, terms and gradients over the micro-batches of one process's share of a step."""
        self.module.train()
        total = torch.zeros((), dtype=self.exact, device=self.accelerator.device)
        terms = torch.zeros_like(total)
        count = len(batch["tokens"])
        for first in range(0, count, self.micro):
            part = {name: one[first : first + self.micro] for name, one in batch.items()}
            last = first + self.micro >= count
            sync_gradients(self.module, last)
            with nullcontext() if last else self.accelerator.no_sync(self.module), self.accelerator.autocast():
                loss, counted = self.module(**part)
                self.accelerator.backward(loss)
            total += loss.detach()
            terms += counted
        return total, terms

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the state if it is the best, otherwise count towards stopping early."""
        outcome = self.outcome
        total, terms = self._fitting(self._held_out_sums)
        loss = float(total / terms)
        self._log({"held_out_loss": loss})
        if outcome.steps == 0:
            outcome.start_loss = loss
        if not math.isfinite(loss):
            self._stop("nan", "the held-out loss is NaN or infinite")
        elif loss < outcome.best_loss:
            outcome.best_loss, outcome.best_step, outcome.without_gain = loss, outcome.steps, 0
            self.folder.save_best(outcome.steps, self._weights(), {})
            self.accelerator.wait_for_everyone()
        else:
            outcome.without_gain += 1
            if outcome.without_gain >= self.settings.patience:
                self._stop("no-gain", f"{outcome.without_gain} evaluations without a gain")

    def _stop(self, reason: StopReason, message: str) -> None:
        self.outcome.stop_reason = reason
        self.outcome.stopped = f"stopped at step {self.outcome.steps}: {message}"

    def _held_out_sums(self) -> Sums:
        """Sum the loss over all held-out items, split over the processes; all call the module equally often."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(range(rank, _length(self.held_out), world))
        rounds = math.ceil(math.ceil(_length(self.held_out) / world) / self.micro)
        sums = torch.zeros(2, dtype=self.exact, device=self.accelerator.device)
        self.module.eval()
        for number in range(rounds):
            numbers = mine[number * self.micro : (number + 1) * self.micro]
            items = default_collate([self.held_out[one] for one in numbers or [0]])
            batch = {name: one.to(self.accelerator.device) for name, one in items.items()}
            with self.accelerator.autocast():
                loss, terms = self.module(**batch)
            if numbers:
                sums += torch.stack([torch.as_tensor(one).to(sums) for one in (loss, terms)])
        sums = self.accelerator.reduce(sums, reduction="sum")
        return sums[0], sums[1]

    def _log(self, entry: dict[str, Any]) -> None:
        numbers = {"step": self.outcome.steps, "tokens": self.outcome.tokens} | entry
        self.folder.log(numbers)
        if self.tracked:
            self.accelerator.log(entry, step=self.outcome.steps)

    def _all_agree(self, due: bool) -> bool:
        """Return the main process's decision on every process."""
        if self.accelerator.num_processes == 1:
            return due
        decided = [due]
        broadcast_object_list(decided)
        return decided[0]

    def _weights(self) -> dict[str, Any]:
        return {"model": get_state_dict(self.module, [], options=_TRAINED)[0]}

    def _everything(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.module, self.optimizer, options=_TRAINED)
        return {"model": weights, "optimizer": optimizer, f"random-{self.accelerator.process_index}": self._random()}

    def _random(self) -> dict[str, torch.Tensor]:
        device = self.accelerator.device
        found = {"cpu": torch.get_rng_state()}
        return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

    def _save(self) -> None:
        facts = {"outcome": asdict(self.outcome), "schedule": self.schedule.state_dict()}
        self.folder.save_state(self.outcome.steps, self._everything(), facts)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Resume from the newest saved state, if there is one."""
        state = self.folder.last_state()
        if state is None:
            self.folder.forget_after(-1)
            return
        tensors = self._everything()
        facts = read(tensors, state)
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=_TRAINED,
        )
        self.schedule.load_state_dict(facts["schedule"])
        random = tensors[f"random-{self.accelerator.process_index}"]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.accelerator.device)
        for name, value in facts["outcome"].items():
            setattr(self.outcome, name, value)
        self.folder.forget_after(self.outcome.steps)

    def _take_best(self) -> None:
        best = self.folder.best_state()
        assert best is not None, "the state before the first step is kept"
        tensors = self._weights()
        read(tensors, best)
        set_state_dict(self.module, [], model_state_dict=tensors["model"], optim_state_dict={}, options=_TRAINED)


def _length(data: Dataset[Batch]) -> int:
    return len(data)  # type: ignore[arg-type]
