"""The one training loop: order by seed, early stopping, checkpoints, exact resume, one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from trajlm.checkpoint import Checkpoints, RunFolder
from trajlm.distributed import placed_like, whole
from trajlm.engines import splits_moments
from trajlm.errors import SharedError, TrajlmError
from trajlm.quantisation import adamw8bit
from trajlm.sharding import shard, unshard
from trajlm.trackers import tell
from trajlm.zero import split_moments

POOL = 32  # batches; eight leave 7 % of positions unfilled on PhysioNet 2012, 32 leave 3 %
FIRST_STEPS = 3
EARLY_STEPS = 10
EXPLODED = 1000.0  # times the loss of the early steps
FUSED_DEVICES = ("cpu", "cuda")
NAMED = 32  # stays of a batch that an error names
LOWER_THE_RATE = "start anew (another --out) with a lower learning rate, or look at the stays"


class Batch(Protocol):
    """Anything that knows its stays and can move to a device."""

    stay_ids: Tensor

    def to(self, device: torch.device) -> Any:
        """The same batch on a device."""


@dataclass
class Stage:
    """What is trained: everything that differs between pretraining, the baseline and the sequence model.

    Attributes:
        name: names the log lines and the checkpoint folder.
        module: ``module(batch)`` returns the loss float[]; its trainable parameters are trained.
        train: positions of the training stays, int[N].
        tuning: positions of the tuning stays.
        collate: positions and a random generator to a batch; the generator is None in evaluation. Called from a thread
            of its own while the step before runs, so it draws from the generator alone, never from torch's.
        lengths: cost of each training stay, to batch stays of similar length; None batches at random.
        global_loss: the loss already spans all processes (negatives are gathered) and is not to be weighted.
        chances: float[N], chance of each training stay to be the next one drawn, with replacement; None draws each stay
            once per epoch.
        rate_factors: by prefix of a parameter's name, the share of the learning rate it is trained with.
        backward: a batch to its loss, the gradients left on the parameters, for a loss that takes more than a forward
            and a backward pass; several processes' gradients averaged. None: ``module`` forward, then backward.
        after_first_steps: called once with the module and their number; raises if something that should learn did not.
    """

    name: str
    module: nn.Module
    train: np.ndarray
    tuning: np.ndarray
    collate: Callable[[np.ndarray, np.random.Generator | None], Batch]
    lengths: np.ndarray | None = None
    chances: np.ndarray | None = None
    rate_factors: dict[str, float] = field(default_factory=dict)
    global_loss: bool = False
    backward: Callable[[Any], Tensor] | None = None
    after_first_steps: Callable[[Any, int], None] = lambda module, steps: None


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast.

    ``decoupled`` is AdamW, otherwise Adam; ``averaging`` as in :class:`WeightAverages`; ``keep_last`` trains all epochs
    and keeps the last weights instead of those of the least tuning loss; ``eight_bit`` moments of AdamW.
    """

    epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    decoupled: bool = True
    warmup_fraction: float = 0.0
    cosine: bool = False
    clip_norm: float = 1.0
    checkpoint_seconds: float = 60.0
    averaging: float = 0.0
    keep_last: bool = False
    eight_bit: bool = False


def epoch_batches(stage: Stage, settings: LoopSettings, epoch: int, smallest: int) -> list[np.ndarray]:
    """The epoch's global batches: the same on every process, a function of seed and epoch alone.

    With lengths, stays are shuffled, then sorted by length within pools of POOL batches, so padding stays small.
    A last batch under ``smallest`` stays joins the one before it.
    """
    random = np.random.default_rng([settings.seed, epoch])
    order = random.permutation(stage.train)
    if stage.chances is not None:
        order = random.choice(stage.train, size=len(stage.train), p=stage.chances)
    size = settings.batch_size
    if stage.lengths is not None:
        length = dict(zip(stage.train.tolist(), stage.lengths.tolist(), strict=True))
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        order = np.concatenate([sorted(pool, key=lambda stay: length[stay]) for pool in pools])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) < smallest:
        batches[-2:] = [np.concatenate(batches[-2:])]
    random.shuffle(batches)
    return batches


def parameter_groups(stage: Stage) -> list[dict[str, Any]]:
    """Trainable parameters grouped by the share of the learning rate they get (``factor``)."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in stage.module.named_parameters():
        if parameter.requires_grad:
            factors = [factor for prefix, factor in stage.rate_factors.items() if name.startswith(prefix)]
            groups.setdefault(factors[0] if factors else 1.0, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def make_optimiser(groups: list[dict[str, Any]], settings: LoopSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings ask for."""
    if settings.eight_bit:
        return adamw8bit(groups, settings.learning_rate, settings.weight_decay)
    kind = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
    # One pass over parameter, gradient and moments; parameter by parameter, large tables cost as much as an encoder.
    fused = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
    return kind(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def learning_rate_share(step: int, total: int, settings: LoopSettings) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or a half cosine to zero."""
    warmup = int(total * settings.warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if not settings.cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass
class Loaded:
    """One process's share of a global batch.

    Attributes:
        stays: int[N], positions of the stays of the global batch.
        share: number of them that this process holds.
        batch: those; where there are none another's stay, which counts for nothing.
        seed: of torch in the step, so that a resumed run draws what the first would have.
    """

    stays: np.ndarray
    share: int
    batch: Batch
    seed: int


@torch.no_grad()
def tuning_loss(stage: Stage, module: nn.Module, batch_size: int, device: torch.device) -> float:
    """Mean loss over the tuning stays, in fixed batches, in evaluation mode."""
    was_training = module.training
    module.eval()
    total = 0.0
    for start in range(0, len(stage.tuning), batch_size):
        stays = stage.tuning[start : start + batch_size]
        total += float(module(stage.collate(stays, None).to(device))) * len(stays)
    module.train(was_training)
    return total / len(stage.tuning)


class WeightAverages:
    """Running means of the trained weights: less swayed by the last batches than the weights themselves.

    Args:
        module: what is trained.
        decay: share of the mean that a step keeps, in the long run; the first steps count for more. 0 keeps no means.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad} if decay else {}
        self.means = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after ``steps`` steps."""
        kept = min(self.decay, steps / (steps + 9))
        for name, parameter in self._trained.items():
            self.means[name].lerp_(parameter, 1 - kept)

    @torch.no_grad()
    def load(self, means: dict[str, Tensor]) -> None:
        """Put back the means of a checkpoint."""
        for name, mean in self.means.items():
            mean.copy_(placed_like(means[name], mean))

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The module with the means for weights, while the block runs."""
        weights = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            parameter.copy_(self.means[name])
        try:
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])


class Trainer:
    """Runs one stage to its end, or on from where it was cut off."""

    def __init__(self, stage: Stage, settings: LoopSettings, run: RunFolder, accelerator: Accelerator) -> None:
        if not len(stage.train) or not len(stage.tuning):
            raise TrajlmError(f"{stage.name}: {len(stage.train)} training and {len(stage.tuning)} tuning stays")
        self.stage, self.settings, self.run, self.accelerator = stage, settings, run, accelerator
        self.checkpoints = Checkpoints(run.path / "checkpoints" / stage.name, run.main)
        self.module = stage.module.to(accelerator.device)
        self.optimiser = make_optimiser(parameter_groups(stage), settings)
        if accelerator.is_fsdp2:
            self.module = shard(accelerator, stage.module, self.optimiser)
        self.state: dict[str, Any] = {
            "step": 0, "epoch": 0, "batch": 0, "best": None, "since_best": 0, "epoch_loss": 0.0, "done": False,
        }  # fmt: skip
        self._saved = time.monotonic()
        self.averages = WeightAverages(self.module, settings.averaging)
        restored = self.checkpoints.restore(self.module, self.optimiser)
        if restored:
            self.state, means = restored
            self.averages.load(means)
            if not self.state["done"]:
                tqdm.write(f"{stage.name}: resumes at epoch {self.state['epoch'] + 1}, step {self.state['step']}")
        self._engine = self.module
        if splits_moments(accelerator):
            self._engine, self.optimiser = split_moments(accelerator, self.module, self.optimiser, settings.clip_norm)

    def fit(self) -> nn.Module:
        """Train until patience or epochs run out; returns the module with its best weights."""
        steps = len(self._batches(0))
        split = self.accelerator.is_fsdp2 or splits_moments(self.accelerator)
        wrapped = self._distributed and self.stage.backward is None and not split
        module = self.accelerator.prepare_model(self.module) if wrapped else self._engine
        with tqdm(
            total=steps * self.settings.epochs,
            initial=self.state["step"],
            desc=self.stage.name,
            unit="batch",
            disable=not self.run.main,
            mininterval=2.0,
        ) as progress:
            while not self.state["done"]:
                self._epoch(module, steps * self.settings.epochs, progress)
        self.accelerator.wait_for_everyone()
        self.checkpoints.load_best(self.module)
        if self.module is not self.stage.module:
            unshard(self.module, self.stage.module)
        self.accelerator.free_memory()
        return self.stage.module.eval()

    @property
    def _distributed(self) -> bool:
        return self.accelerator.num_processes > 1

    def _epoch(self, module: nn.Module, total: int, progress: tqdm) -> None:
        settings, state = self.settings, self.state
        module.train()
        batches = self._batches(state["epoch"])
        self._saved = time.monotonic()
        for loaded in self._loaded(batches):
            loss, save = self._step(module, loaded, total)
            state["epoch_loss"] += loss
            state["batch"] += 1
            state["step"] += 1
            if state["step"] == FIRST_STEPS:
                self.stage.after_first_steps(self.module, FIRST_STEPS)
            progress.update()
            if save:
                self._save()
                self._saved = time.monotonic()
        with self.averages.in_place():
            loss = tuning_loss(self.stage, self.module, settings.batch_size, self.accelerator.device)
            if not math.isfinite(loss):
                raise SharedError(f"{self.stage.name}: the tuning loss became {loss}; {LOWER_THE_RATE}")
            improved = state["best"] is None or loss < state["best"] or settings.keep_last
            if improved:
                self.checkpoints.save_best(self.module)
        train_loss = state["epoch_loss"] / len(batches)
        state["best"] = loss if improved else state["best"]
        state["since_best"] = 0 if improved else state["since_best"] + 1
        state.update(epoch=state["epoch"] + 1, batch=0, epoch_loss=0.0)
        state["done"] = state["epoch"] >= settings.epochs or state["since_best"] >= settings.patience
        progress.set_postfix(
            epoch=state["epoch"], train=f"{train_loss:.4f}", tuning=f"{loss:.4f}", best=f"{state['best']:.4f}"
        )
        rate = self.optimiser.param_groups[0]["lr"]
        told = {"train_loss": train_loss, "tuning_loss": loss, "best_tuning_loss": state["best"], "learning_rate": rate}
        tell(self.accelerator, {f"{self.stage.name}/{key}": value for key, value in told.items()}, state["step"])
        self.run.log(arm=self.stage.name, epoch=state["epoch"], train_loss=train_loss, tuning_loss=loss, best=improved)
        self._save()

    def _batches(self, epoch: int) -> list[np.ndarray]:
        # Negatives are gathered from shares that must not be empty; elsewhere a share may be.
        smallest = self.accelerator.num_processes if self.stage.global_loss else 1
        return epoch_batches(self.stage, self.settings, epoch, smallest)

    def _loaded(self, batches: list[np.ndarray]) -> Iterator[Loaded]:
        """The batches of the epoch that are left, each collated while the step before it runs."""
        with ThreadPoolExecutor(1, "collate") as thread:

            def load(place: int) -> Future[Loaded] | None:
                return thread.submit(self._load, batches[place], place) if place < len(batches) else None

            place = self.state["batch"]
            coming = load(place)
            while coming is not None:
                place += 1
                loaded, coming = coming.result(), load(place)
                yield loaded

    def _load(self, stays: np.ndarray, place: int) -> Loaded:
        """This process's share of the epoch's batch at ``place``."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        random = np.random.default_rng([self.settings.seed, self.state["epoch"], place, rank])
        seed = int(random.integers(2**62))
        share = stays[rank::world]
        # A process with no stay of the batch still takes part, with another's stay that counts for nothing.
        return Loaded(stays, len(share), self.stage.collate(share if len(share) else stays[:1], random), seed)

    def _step(self, module: nn.Module, loaded: Loaded, total: int) -> tuple[float, bool]:
        """One step on a global batch: its loss over all processes, and whether a checkpoint is due."""
        state, settings, world = self.state, self.settings, self.accelerator.num_processes
        torch.manual_seed(loaded.seed)
        batch = loaded.batch.to(self.accelerator.device)
        for group in self.optimiser.param_groups:
            share_now = learning_rate_share(state["step"], total, settings)
            group["lr"] = settings.learning_rate * group["factor"] * share_now
        loss = (self.stage.backward or module)(batch)
        weight = 1 / world if self.stage.global_loss else loaded.share / len(loaded.stays)
        told = self._tell(float(loss.detach()), weight, batch)
        if self.stage.backward is None:
            # Gradients are averaged over processes; weighting makes that the mean over the global batch's stays.
            self.accelerator.backward(loss * (weight * world))
        trained = [p for p in self.module.parameters() if p.requires_grad]
        # DeepSpeed has clipped and stepped by now, or left all as it was where the norm is no finite number.
        norm = float(whole(self.accelerator.clip_grad_norm_(trained, settings.clip_norm)))
        if not math.isfinite(norm):
            self._stop(f"the norm of the gradient became {norm}", batch, True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.averages.update(state["step"] + 1)
        return told

    def _tell(self, loss: float, weight: float, batch: Batch) -> tuple[float, bool]:
        """The loss over all processes, and whether the main one finds a checkpoint due; stops all where one must stop.

        Every process must learn the same: one that stops or saves alone leaves the others waiting for ever.
        """
        due = self.run.main and time.monotonic() - self._saved > self.settings.checkpoint_seconds
        bad = weight > 0 and not math.isfinite(loss)
        mine = [loss * weight if weight > 0 and not bad else 0.0, float(bad), float(due)]
        whole = torch.tensor(mine, dtype=torch.float64)
        whole = self.accelerator.reduce(whole.to(self.accelerator.device), "sum").tolist()
        if whole[1]:
            self._stop("the loss is no finite number", batch, bad)
        early = self.state.setdefault("early", [])
        if len(early) < EARLY_STEPS:
            early.append(whole[0])
        elif whole[0] > EXPLODED * max(sum(early) / len(early), 1e-3):
            usual = sum(early) / len(early)
            self._stop(
                f"the loss became {whole[0]:.4g}, in the first {EARLY_STEPS} steps it was {usual:.4g}", batch, True
            )
        return whole[0], whole[2] > 0

    def _stop(self, why: str, batch: Batch, mine: bool) -> NoReturn:
        """Raise on every process at once, naming the stays of those whose share went wrong."""
        stays = [str(int(stay)) for stay in batch.stay_ids] if mine else []
        named = gather_object(stays) if self._distributed else stays
        rest = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise SharedError(
            f"{self.stage.name}, step {self.state['step'] + 1}: {why}, on a batch with stays "
            f"{', '.join(named[:NAMED])}{rest}; {LOWER_THE_RATE}"
        )

    def _save(self) -> None:
        self.checkpoints.save(self.module, self.optimiser, self.state, self.averages.means)
        self.accelerator.wait_for_everyone()


def history(run_log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Epoch records of a log, the last one of each stage and epoch (a resumed epoch is logged twice)."""
    latest = {(r["arm"], r["epoch"]): r for r in run_log if "epoch" in r}
    return [latest[key] for key in sorted(latest)]
