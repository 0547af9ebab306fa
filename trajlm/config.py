"""Typed settings of every stage: built, checked, saved and loaded here.

A recipe is one YAML file with these sections. A flag (``--pretraining.epochs 5``), a YAML key and a Python attribute
have the same name. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from trajlm.errors import TrajlmError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise TrajlmError(message)


BASELINES = ("mlp", "lstm", "logistic", "lightgbm", "severity")


@dataclass
class PrepareConfig:
    """Raw release to prepared folder.

    Args:
        cohort: name of the cohort: synthetic, mimic, eicu, physionet2012 or meds.
        raw: folder of the release as it lies on disk.
        splits: CSV file with the columns stay_id and split (train, tuning, held_out), to use published splits.
        window_hours: events later than this after admission to the unit are left out; null keeps the whole stay.
        before_admission_hours: rows up to this long before admission to the unit are kept, dated at hour 0; 0 keeps
            none.
        bin_hours: width of the time bins whose rows of one modality form one event; 0 joins rows of the same minute
            only; null takes the cohort's default.
        result_times: available dates a result by when it could be known (storetime, revised offset), charted by when
            the specimen was taken or the examination made.
        sets: PhysioNet 2012 only: which of the sets a, b and c to read; empty reads every set found.
        notes_folder: MIMIC only: folder of MIMIC-IV-Note where it lies apart from raw.
        images_folder: MIMIC only: folder of MIMIC-CXR-JPG where it lies apart from raw.
        items: MIMIC only: item ids of chartevents and labevents to read beside the default variables.
        discharge_notes: keep discharge summaries. They are written after the outcome is known: a leak for mortality.
        further_modalities: eICU only: vital_periodic, vital_aperiodic, infusion.
        aps_at_admission: eICU only: date the severity score's variables at hour 0, as the paper does, rather than at
            hour 24 when they could be known: a leak.
        least_code_share: eICU only: a code or laboratory test is a feature if at least this share of the training stays
            hold it.
        mapping: MEDS only: YAML file that sends codes to modalities and names the targets.
        paper_faithful: restore the choices of the paper (whole stays, discharge summaries, charted times, severity
            variables at admission; eICU: drug orders by their start, of the demographics age, gender and ethnicity
            alone, no stays without laboratory results), leaks included.
        image_pixels: chest X-rays are stored greyscale, centre-cropped to a square of this many pixels a side.
        seed: seed of the split.
        processes: how many shards of stays to prepare at a time.
        rejected_rows: most rejected rows to store per table and reason; all are counted. null stores all.
    """

    cohort: str = "synthetic"
    raw: str | None = None
    splits: str | None = None
    window_hours: float | None = 48.0
    before_admission_hours: float = 0.0
    bin_hours: float | None = None
    result_times: Literal["available", "charted"] = "available"
    sets: list[str] = field(default_factory=list)
    notes_folder: str | None = None
    images_folder: str | None = None
    items: list[int] = field(default_factory=list)
    discharge_notes: bool = False
    further_modalities: list[str] = field(default_factory=list)
    aps_at_admission: bool = False
    least_code_share: float = 0.05
    mapping: str | None = None
    paper_faithful: bool = False
    image_pixels: int = 64
    seed: int = 0
    processes: int = 1
    rejected_rows: int | None = 1_000_000

    def __post_init__(self) -> None:
        _require(self.window_hours is None or self.window_hours > 0, "prepare.window_hours must be positive or null")
        _require(self.before_admission_hours >= 0, "prepare.before_admission_hours must not be negative")
        _require(self.bin_hours is None or self.bin_hours >= 0, "prepare.bin_hours must not be negative")
        _require(0 <= self.least_code_share <= 1, "prepare.least_code_share must lie in [0, 1]")
        _require(self.image_pixels >= 16, "prepare.image_pixels must be at least 16")
        _require(self.processes >= 1, "prepare.processes must be at least 1")
        _require(self.rejected_rows is None or self.rejected_rows >= 0, "prepare.rejected_rows must not be negative")
        if self.paper_faithful:
            self.window_hours, self.discharge_notes = None, True
            self.result_times, self.aps_at_admission = "charted", True


@dataclass
class EncoderConfig:
    """One encoder per modality.

    Args:
        latent_width: width D of every latent.
        hidden_width: width of the hidden layers.
        dropout: dropout inside the encoders.
        by_modality: encoder name for a modality; the others take the default of their kind (static numeric: mlp,
            other numeric: lstm, text: hashed-text, image: cnn).
        layers: layers of the series encoders; null is 1 for lstm and gru, 2 for transformer and mufuse, 3 for tcn.
        heads: attention heads of transformer and mufuse.
        state: give numeric events the carried-forward last value, whether ever observed and hours since, of every
            feature of their modality. mufuse, which reads what was measured alone, has no use for it.
        values: signed_log gives numeric encoders sign(x) log(1 + |x|) as it is (the paper); linear standardises it by
            the training split; piecewise adds, for every value and age of a value, the shares of fixed intervals that
            lie below it, so that a threshold is one weight.
        partition: k of mufuse: the embedding of a value has the k-th part of hidden_width and is repeated k times.
        fusion: how mufuse joins feature and value: multiply; add and concatenate are its ablations.
        time: how mufuse joins time: add; multiply is its ablation.
        tuning_by_modality: of encoders with pretrained weights: frozen trains what stands on top of them (the default),
            lora adapters beside them as well, full all of them.
        lora_rank: rank of those adapters.
        max_tokens: word pieces of a note that a pretrained text encoder reads at once, if it has so many positions.
        long_notes: of a longer note, head reads the beginning; head_and_tail a quarter of the beginning, the rest from
            the end; chunks reads it piece after piece, at most max_chunks of them, and takes the mean.
        max_chunks: pieces of a note that chunks reads.
        augment: show image encoders every picture a little differently each time, in training: random resized crop,
            flip, affine, jitter of brightness and contrast.
    """

    latent_width: int = 64
    hidden_width: int = 128
    dropout: float = 0.1
    by_modality: dict[str, str] = field(default_factory=dict)
    layers: int | None = None
    heads: int = 4
    state: bool = True
    values: Literal["signed_log", "linear", "piecewise"] = "piecewise"
    partition: int = 4
    fusion: Literal["multiply", "add", "concatenate"] = "multiply"
    time: Literal["add", "multiply"] = "add"
    tuning_by_modality: dict[str, Literal["frozen", "lora", "full"]] = field(default_factory=dict)
    lora_rank: int = 8
    max_tokens: int = 512
    long_notes: Literal["head", "head_and_tail", "chunks"] = "head"
    max_chunks: int = 8
    augment: bool = True

    def __post_init__(self) -> None:
        _require(self.latent_width >= 2, "encoder.latent_width must be at least 2")
        _require(self.layers is None or self.layers >= 1, "encoder.layers must be at least 1, or null")
        for name in ("heads", "partition", "lora_rank", "max_chunks"):
            _require(getattr(self, name) >= 1, f"encoder.{name} must be at least 1")
        _require(self.max_tokens >= 8, "encoder.max_tokens must be at least 8")
        _require(0 <= self.dropout < 1, "encoder.dropout must lie in [0, 1)")


@dataclass
class PretrainingConfig:
    """Masked Global Alignment (method 2 and 3).

    Args:
        epochs: most epochs to train.
        patience: epochs without a better tuning loss before stopping.
        batch_size: stays per batch over all processes; every other stay of a batch is a negative.
        learning_rate: of Adam.
        weight_decay: of Adam.
        modality_dropout: probability that one present modality of a stay is masked, in training only.
        missing_token_loss_weight: weight of the loss that teaches missing tokens; 0 is the paper's equations, whose
            tokens never learn.
        event_view_probability: probability that an encoder sees one single event instead of the whole window, in
            training only: the sequence model feeds it single events later. 0 is the paper.
        window_view_probability: probability that an encoder sees a random run of neighbouring events instead, in
            training only. 0 is the paper.
        temperature: where the learnable temperature starts.
        objective: masked_global is the paper's loss; pairwise contrasts two modalities at a time on the stays that hold
            both; one_versus_others is the paper's loss on complete stays alone.
        chunk_size: stays that a process encodes at once where a whole batch would not fit into memory: the same
            gradients for one more forward pass. null encodes a batch at once.
    """

    epochs: int = 100
    patience: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    modality_dropout: float = 0.3
    missing_token_loss_weight: float = 1.0
    event_view_probability: float = 0.5
    window_view_probability: float = 0.0
    temperature: float = 0.07
    objective: Literal["masked_global", "pairwise", "one_versus_others"] = "masked_global"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.epochs >= 1 and self.patience >= 1, "pretraining.epochs and patience must be at least 1")
        _require(self.batch_size >= 2, "pretraining.batch_size must be at least 2: a stay needs a negative")
        for name in ("modality_dropout", "event_view_probability", "window_view_probability"):
            _require(0 <= getattr(self, name) <= 1, f"pretraining.{name} must lie in [0, 1]")
        _require(
            self.event_view_probability + self.window_view_probability <= 1,
            "pretraining.event_view_probability and window_view_probability must add up to 1 at the most",
        )
        _require(self.learning_rate > 0, "pretraining.learning_rate must be positive")
        _require(self.missing_token_loss_weight >= 0, "pretraining.missing_token_loss_weight must not be negative")
        _require(self.chunk_size is None or self.chunk_size >= 1, "pretraining.chunk_size must be at least 1 or null")
        _require(0.01 <= self.temperature <= 1, "pretraining.temperature must lie in [0.01, 1]")


@dataclass
class BackboneConfig:
    """The causal language model that reads the events.

    Args:
        name: a preset (tiny, smollm2-135m, ...), a hub id, or a local folder of transformers weights.
        tuning: lora tunes low-rank adapters; full tunes every weight; auto is full where the weights start at random
            (tiny) and lora elsewhere.
        lora_rank: rank r.
        lora_alpha: scale alpha.
        lora_dropout: dropout before the adapters.
        lora_targets: linear layers to adapt, by their last name; empty takes those of the preset's family.
        attention: flash (FlashAttention 2, in training), sdpa, eager, or auto by the hardware.
        quantisation: nf4 holds the frozen weights in 4 bits (an extra: trajlm[quant]), bf16 in 16, none in 32.
        precision: fp32, bf16 (autocast in training; beliefs are always stated in fp32) or auto by the hardware.
        gradient_checkpointing: trade time for memory in the backward pass.
    """

    name: str = "smollm2-135m"
    tuning: Literal["auto", "lora", "full"] = "auto"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=list)
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    quantisation: Literal["none", "bf16", "nf4"] = "none"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 1, "backbone.lora_rank must be at least 1")
        frozen = self.quantisation == "none" or self.tuning != "full"
        _require(
            frozen, f"backbone.quantisation {self.quantisation} holds frozen weights: it needs backbone.tuning lora"
        )


@dataclass
class FinetuningConfig:
    """The sequence model, and the baselines on the same stays.

    Args:
        tasks: what to predict: mortality, length_of_stay, remaining_length_of_stay (in the unit, from each belief on),
            phenotyping (25 targets), label:NAME and hours:NAME (any other target_NAME of the stays: 0 or 1, or hours).
        stays: train learns from the training split; unseen learns only from stays that pretraining's training split
            never saw (the paper: 85 % of the tuning split's patients train, the others tune); auto is train for
            published splits and unseen otherwise. The held-out split is held out in every case.
        epochs: most epochs to train.
        patience: epochs without a better tuning loss before stopping.
        keep: best keeps the weights of the least tuning loss; last trains all epochs and keeps the last ones, since a
            learning rate that falls to nothing also averages, and a sum of losses is not what a model is judged by.
        batch_size: stays per batch over all processes.
        batching: by_length puts stays of similar length into a batch; padded any stays; packed any stays, several of
            them in one row, each reading itself alone. Beliefs are the same.
        predict_visible: later positions may attend to earlier [PREDICT]s (the paper); false hides them, so that a
            belief is that of the events alone.
        optimiser: adamw, or adamw8bit, whose moments take a quarter of the memory (an extra: trajlm[quant]).
        learning_rate: of AdamW for projectors, [PREDICT] and heads, which start from nothing.
        backbone_learning_rate: of AdamW for the backbone; null takes learning_rate for weights that start at random
            and a quarter of it for pretrained ones and their adapters.
        weight_decay: of AdamW.
        warmup_fraction: share of the steps in which the learning rate rises; it falls as a cosine after.
        weight_averaging: share of a running mean of the weights that a step keeps; the means are what is evaluated and
            saved. 0 takes the weights as they are.
        modality_dropout: probability that all events of one modality of a stay are ablated, in training only.
        drift_penalty: weight of the mean squared change of a stay's read-outs once one random modality is ablated, in
            training only; costs a second reading of each batch. 0 is the paper.
        anchoring_penalty: weight of the share of the last layer's attention that read-outs put on demographics once one
            random modality is ablated; likewise.
        loss_over: which read-outs of a stay count: all alike, rising (by the square root of their hour, so that what is
            known late weighs more), or the last one only.
        event_context: own embeds every event alone (the paper); newest brings along the newest event of every other
            modality, or its missing token, so that one read-out sees the whole present state of the stay.
        event_latents: own has a frozen encoder read every event alone (the paper); history has it read all events of
            the modality so far, where it reads in order (lstm, gru); both puts one beside the other.
        event_inputs: latent shows the backbone the frozen encoder's latent (the paper); latent_and_state shows the
            carried-forward values behind it as well, as piecewise linear codes; state shows those values alone where a
            modality is numeric, which spares the backbone latents of encoders that were never pretrained.
        running_mean: show the backbone beside every carried-forward value also the mean of the feature's values so far:
            a level that one odd measurement does not hide.
        readout: predict reads a belief from its [PREDICT] position alone (the paper); predict_and_event adds a direct
            read-out of the event's embedding, so that the backbone need only learn what history adds.
        linear_readout: fit a regression of the newest event of every modality as well, penalised so that its loss on
            the tuning stays is least, and average its read-outs with the network's. False is the paper.
        tree_readout: grow gradient-boosted trees of what is known at every moment as well, as many as have the least
            loss on the tuning stays, and average their read-outs with the others'. False is the paper.
        tree_hours: of tree_readout: hours since admission after each of which more trees speak, grown on the read-outs
            from there on.
        dropout: on event embeddings and before the read-outs, in training.
        input_dropout: share of latents' and states' entries left out of an event, in training.
        time_encoding: add to every event an encoding of the hours since admission, or of its place in the timeline
            alone (order); off is the paper.
        modality_embedding: add to every event a learned vector of its modality.
        prompt: text that stands before the first event, as tokens of the backbone's own vocabulary; null is none.
        readout_at: which beliefs count, in the loss and in beliefs.parquet: those after every event, or the last one
            up to every full hour, or up to every landmark (6, 12, 24, 48 hours) and the end.
        max_events: longest timeline: of later events only static ones are read; the others get no belief.
        baselines: what to compare with, on the same stays, refitted for each landmark: mlp and lstm fuse the latents of
            what was known by then; logistic and lightgbm read summary features; severity is
            a logistic regression on each severity score of the release alone, from 24 hours on.
        ensembles: baselines, each also among baselines, whose beliefs are averaged with the sequence model's as arms
            of their own; not severity.
        baseline_epochs: most epochs of mlp and lstm.
        baseline_trials: settings of each baseline tried on the tuning stays; each has 6.
        sampling: uniform learns from each training stay once per epoch; balanced draws stays with and without the first
            probability's outcome equally often and weighs their losses by as much less, so that beliefs keep meaning
            frequencies in the training stays. Models of summary features and scores always learn from each stay once.
        focal_gamma: exponent of the focal loss of probabilities; 0 is cross-entropy. Focal beliefs are less extreme
            than frequencies.
        bootstrap_resamples: patient-level resamples behind every 95 % interval.
    """

    tasks: list[str] = field(default_factory=lambda: ["mortality", "length_of_stay"])
    stays: Literal["auto", "unseen", "train"] = "auto"
    epochs: int = 20
    patience: int = 4
    keep: Literal["best", "last"] = "best"
    batch_size: int = 16
    batching: Literal["by_length", "padded", "packed"] = "by_length"
    predict_visible: bool = True
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 2e-3
    backbone_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    weight_averaging: float = 0.99
    modality_dropout: float = 0.2
    drift_penalty: float = 0.0
    anchoring_penalty: float = 0.0
    loss_over: Literal["all", "rising", "last"] = "rising"
    event_context: Literal["own", "newest"] = "newest"
    event_latents: Literal["own", "history", "both"] = "both"
    event_inputs: Literal["latent", "latent_and_state", "state"] = "latent_and_state"
    running_mean: bool = True
    readout: Literal["predict", "predict_and_event"] = "predict_and_event"
    linear_readout: bool = False
    tree_readout: bool = False
    tree_hours: list[float] = field(default_factory=list)
    dropout: float = 0.3
    input_dropout: float = 0.4
    time_encoding: Literal["hours", "order", "off"] = "hours"
    modality_embedding: bool = False
    prompt: str | None = None
    readout_at: Literal["event", "hour", "landmarks"] = "event"
    max_events: int = 1000
    baselines: list[str] = field(default_factory=lambda: ["mlp", "logistic"])
    ensembles: list[str] = field(default_factory=list)
    baseline_epochs: int = 200
    baseline_trials: int = 6
    sampling: Literal["uniform", "balanced"] = "uniform"
    focal_gamma: float = 0.0
    bootstrap_resamples: int = 1000

    def __post_init__(self) -> None:
        _require(bool(self.tasks), "finetuning.tasks must name at least one task")
        for name in ("epochs", "patience", "batch_size", "baseline_epochs", "baseline_trials", "bootstrap_resamples"):
            _require(getattr(self, name) >= 1, f"finetuning.{name} must be at least 1")
        _require(self.learning_rate > 0, "finetuning.learning_rate must be positive")
        _require(0 <= self.warmup_fraction < 1, "finetuning.warmup_fraction must lie in [0, 1)")
        _require(0 <= self.modality_dropout <= 1, "finetuning.modality_dropout must lie in [0, 1]")
        for name in ("drift_penalty", "anchoring_penalty"):
            _require(getattr(self, name) >= 0, f"finetuning.{name} must not be negative")
        for name in ("dropout", "input_dropout", "weight_averaging"):
            _require(0 <= getattr(self, name) < 1, f"finetuning.{name} must lie in [0, 1)")
        _require(len(set(self.tree_hours)) == len(self.tree_hours), "finetuning.tree_hours names one twice")
        _require(self.max_events >= 2, "finetuning.max_events must be at least 2")
        _require(self.focal_gamma >= 0, "finetuning.focal_gamma must not be negative")
        for name in self.baselines:
            _require(name in BASELINES, f"finetuning.baselines: {name!r} is not known; all are {', '.join(BASELINES)}")
        _require(len(set(self.baselines)) == len(self.baselines), "finetuning.baselines names one twice")
        lone = sorted(set(self.ensembles) - set(self.baselines))
        _require("severity" not in self.ensembles, "finetuning.ensembles: severity scores are not averaged")
        _require(not lone, f"finetuning.ensembles: {', '.join(lone)} must stand in finetuning.baselines too")


@dataclass
class Recipe:
    """One experiment, raw records to beliefs.

    Args:
        data: prepared folder, made by `trajlm prepare`.
        out: run folder; started again with the same settings, an interrupted run resumes there.
        encoders: run folder of pretraining, or "scratch" for encoders that were never pretrained.
        seed: seed of initialisation, order and dropout.
        tracker: where the losses of pretraining and fine-tuning also go, below the run folder: tensorboard, wandb
            (offline unless WANDB_MODE says otherwise), mlflow or none; auto is tensorboard where it is installed.
        prepare: raw release to prepared folder.
        encoder: settings of the encoders, one per modality.
        pretraining: Masked Global Alignment.
        backbone: the causal language model.
        finetuning: sequence model and baselines.
    """

    data: str | None = None
    out: str | None = None
    encoders: str = "scratch"
    seed: int = 0
    tracker: Literal["auto", "none", "tensorboard", "wandb", "mlflow"] = "auto"
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)


def is_section(name: str) -> bool:
    """Whether this key of a recipe holds keys of its own."""
    return any(key.startswith(f"{name}.") for key in valid_keys())


def from_dict(config: type, values: dict[str, Any]) -> Any:
    """Build a settings dataclass, sections included, from plain values."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(config)}
    built = {}
    for name, value in values.items():
        section = sections.get(name)
        nested = isinstance(section, type) and dataclasses.is_dataclass(section) and isinstance(value, dict)
        built[name] = from_dict(cast(type, section), dict(value)) if nested else value
    return config(**built)


def valid_keys(config: type = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, sections dotted."""
    keys: list[str] = []
    for item in dataclasses.fields(config):
        keys.append(prefix + item.name)
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            keys += valid_keys(factory, f"{prefix}{item.name}.")
    return keys
