"""Every setting of a run, in one place: frozen dataclasses with units.

Every field carries its help text, and its value is checked when its section is made. Layers are put together by
`ris_fast.config.load`. Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ris_fast.config.own_physics import elements_in, file_hash, function_hash
from ris_fast.config.section import SMALLEST_FLOAT, ConfigError, Section, option
from ris_fast.config.spelling import closest, did_you_mean, words
from ris_fast.config.user_code import FORMS, absolute_reference, is_reference

MODELS = ("backprojection", "hybrid")
TRACKERS = ("tensorboard", "trackio", "wandb")
# Where a task's own files and function are, and what is known of their content: this and not the place is what a run
# depends on. A layer that gives the place without the content means whatever lies there.
CONTENTS = {
    "elements_file": ("elements_hash", "ris_elements"),
    "codes_file": ("codes_hash",),
    "channel": ("channel_hash",),
}


@dataclass(frozen=True)
class Task(Section):
    """The scenes: array, channel, codes and the ranges they are drawn from. Defaults are RIS-12x12."""

    bs_antennas: int = option(16, "antennas of the base station, M", low=1)
    ris_horizontal: int = option(12, "RIS elements in a row, N_H", low=2)
    ris_vertical: int = option(12, "RIS elements in a column, N_V", low=2)
    snapshots: int = option(16, "codes shown one after the other, L", low=1, high=64)
    max_sources: int = option(5, "largest number of sources, K_max", low=1, high=16)
    wavelength_m: float = option(0.3, "carrier wavelength in metres", low=1e-6, high=1e3)
    spacing_wavelengths: float = option(0.5, "element spacing in wavelengths", low=1e-3, high=1e3)
    wavefront: str = option("fresnel", "steering vector of a near-field source", choices=("fresnel", "spherical"))
    azimuth_deg: float = option(60.0, "azimuth is uniform in +- this many degrees", low=0.0, high=90.0)
    elevation_deg: float = option(30.0, "elevation is uniform in +- this many degrees", low=0.0, high=90.0)
    range_min_m: float = option(0.5, "nearest source in metres", low=1e-3, high=1e6)
    range_max_m: float = option(10.0, "farthest source in metres", low=1e-3, high=1e6)
    snr_min_db: float = option(-5.0, "lowest signal-to-noise ratio in dB", low=-100.0, high=120.0)
    snr_max_db: float = option(20.0, "highest signal-to-noise ratio in dB", low=-100.0, high=120.0)
    rician_min: float = option(0.5, "lowest Rician factor of the BS-RIS channel, linear", low=0.0, high=1e6)
    rician_max: float = option(10.0, "highest Rician factor of the BS-RIS channel, linear", low=0.0, high=1e6)
    code_bits: int = option(3, "bits of a RIS phase", low=1, high=16)
    symbols: str = option(
        "static", "source symbols: drawn once a scene or once a snapshot", choices=("static", "per_snapshot")
    )
    power: str = option(
        "path_loss", "source powers: by free-space path loss or all equal", choices=("path_loss", "equal")
    )
    phase_error_deg: float = option(
        0.0, "rms phase error of a RIS element in degrees, unknown to network and estimators", low=0.0, high=180.0
    )
    phase_error_surface: int = option(
        0, "number of the surface whose phase errors all scenes share; 0: each scene draws its own", low=0
    )
    channel_snr_db: float = option(
        0.0,
        "SNR in dB of the channel estimate that network and estimators get; 0: the channel itself",
        low=0.0,
        high=120.0,
    )
    elements_file: str = option(
        "", "file with the positions of the elements, (N, 2) in metres; empty: the regular grid", compare=False
    )
    elements_hash: str = option("", "content of elements_file; filled in, and checked from then on")
    ris_elements: int = option(0, "elements in elements_file; filled in", low=0)
    codes_file: str = option("", "file with the code book, (L, N); empty: DFT beams", compare=False)
    codes_hash: str = option("", "content of codes_file; filled in, and checked from then on")
    channel: str = option(
        "", "function that draws the BS-RIS channel, module:NAME or file.py:NAME; empty: Rician", compare=False
    )
    channel_hash: str = option("", "source of that function; filled in, and checked from then on")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._find_contents()
        for low, high in (("range_min_m", "range_max_m"), ("snr_min_db", "snr_max_db"), ("rician_min", "rician_max")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"task.{low} = {getattr(self, low)} is above task.{high} = {getattr(self, high)}.")

    def _find_contents(self) -> None:
        """Makes the places of own files and code absolute, and records what lies there where nothing is recorded."""
        for place, contents in CONTENTS.items():
            given = getattr(self, place)
            if not given:
                if stray := [name for name in contents if getattr(self, name)]:
                    raise ConfigError(f"task.{stray[0]} = {getattr(self, stray[0])!r} without task.{place}: give both.")
                continue
            value = absolute_reference(given) if place == "channel" else os.path.abspath(os.path.expanduser(given))
            object.__setattr__(self, place, value)
            if not getattr(self, contents[0]):
                find = function_hash if place == "channel" else file_hash
                object.__setattr__(self, contents[0], find(f"task.{place}", value))
                if place == "elements_file":
                    self._count_elements()

    def _count_elements(self) -> None:
        found = elements_in(self.elements_file)
        if self.ris_elements not in (0, found):
            raise ConfigError(
                f"task.ris_elements = {self.ris_elements}, and there are {found} elements in task.elements_file ="
                f" '{self.elements_file}'. Leave task.ris_elements out."
            )
        object.__setattr__(self, "ris_elements", found)

    @property
    def elements(self) -> int:
        """N: of elements_file where there is one, else N_H N_V."""
        return self.ris_elements or self.ris_horizontal * self.ris_vertical

    def identity(self) -> dict[str, Any]:
        """Every setting by name, of own files and code their content and not their place: what a run depends on."""
        return {key: value for key, value in asdict(self).items() if key not in CONTENTS}

    def changed(self, **settings: Any) -> Task:
        """The task with other settings; another file or function brings its own content."""
        fresh: dict[str, Any] = {}
        for place, contents in CONTENTS.items():
            if place in settings:
                fresh |= {name: type(getattr(self, name))() for name in contents}
        return replace(self, **{**fresh, **settings})

    @property
    def spacing_m(self) -> float:
        return self.spacing_wavelengths * self.wavelength_m


@dataclass(frozen=True)
class Data(Section):
    """Where scenes come from and how many."""

    source: str = option(
        "auto",
        "simulate on the device, or read files from data.path; auto: files if a path is given",
        choices=("auto", "simulate", "npz", "shards"),
    )
    path: str = option("", "folder of shards (ours, or the original pipeline's .npz)")
    train_scenes: int = option(160_000, "training scenes an epoch", low=1)
    val_scenes: int = option(40_000, "validation scenes in the split", low=1)
    test_scenes: int = option(8_000, "test scenes in the split", low=1)
    val_limit: int = option(4_000, "validate on the first this many validation scenes during training", low=1)
    seed: int = option(0, "seed of the simulated scenes, all splits; weights and order have training.seed", low=0)
    memory: str = option(
        "auto",
        "where scenes of files stay while training; auto: on the device, on the host or in the files, as they fit",
        choices=("auto", "device", "host", "files"),
    )
    verify: bool = option(True, "check every byte of our shards on opening; false: only headers and sizes")
    fixed: bool = option(False, "simulate the same training scenes in every epoch instead of fresh ones")


@dataclass(frozen=True)
class Model(Section):
    """The network. Options that a model does not have are refused when it is built."""

    name: str = option("backprojection", f"network: backprojection, hybrid, or one of your own, {FORMS}")
    options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of this network, such as width or depth", "choices": (), "low": None, "high": None},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_reference(self.name):
            object.__setattr__(self, "name", absolute_reference(self.name))  # frozen: this is its construction
        elif self.name not in MODELS:
            raise ConfigError(
                f"model.name is {self.name!r}; it must be one of: {', '.join(MODELS)}; or a network of your own,"
                f" {FORMS}." + (f" Did you mean '{near}'?" if (near := closest(self.name, MODELS)) else "")
            )


@dataclass(frozen=True)
class Loss(Section):
    """Weight of every term, and how the effective covariance is built."""

    cov: float = option(1.0, "weight: NMSE of the effective covariance (with blend)", low=0.0)
    cov_pred: float = option(0.05, "weight: NMSE of the predicted covariance alone (no blend)", low=0.0)
    orthogonality: float = option(0.0, "weight: orthogonality of the factor columns", low=0.0)
    cross: float = option(0.0, "weight: agreement of the two factors' column Gram matrices", low=0.0)
    angle: float = option(0.0, "weight: Huber on wrapped angles of matched sources, delta 0.25 deg", low=0.0)
    range: float = option(0.0, "weight: Huber on log-range of matched sources, delta 0.2", low=0.0)
    chamfer: float = option(0.0, "weight: Chamfer distance on (azimuth, elevation)", low=0.0)
    subspace: float = option(0.0, "weight: power of the prediction outside the true steering vectors", low=0.0)
    contrast: float = option(0.0, "weight: peak contrast around the true sources", low=0.0)
    count: float = option(0.0, "weight: cross-entropy of the number of sources", low=0.0)
    beta: float = option(0.0, "blend of a sample covariance into the prediction", low=0.0, high=0.95)
    loading: float = option(0.0, "diagonal loading eps, on both sides", low=0.0)
    shrink: float = option(0.0, "shrinkage alpha_0, on both sides", low=0.0, high=1.0)
    own: str = option("", f"a term of your own, {FORMS}: (prediction, scenes) -> one number a scene; empty: none")
    own_weight: float = option(1.0, "weight: the term of your own", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_reference(self.own):
            object.__setattr__(self, "own", absolute_reference(self.own))  # frozen: this is its construction
        elif self.own:
            raise ConfigError(f"loss.own is {self.own!r}; expected {FORMS}, or nothing.")


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW with a backbone and a head group, clipping, warm-up, cosine and EMA, counted in applied steps."""

    backbone_lr: float = option(1e-3, "peak learning rate of the backbone", low=0.0)
    head_lr: float = option(1e-3, "peak learning rate of the heads", low=0.0)
    beta1: float = option(0.9, "AdamW beta 1", low=0.0, high=0.9999)
    beta2: float = option(0.999, "AdamW beta 2", low=0.0, high=0.99999)
    eps: float = option(1e-8, "AdamW epsilon", low=SMALLEST_FLOAT)
    weight_decay: float = option(1e-4, "decoupled weight decay; never on norms and biases", low=0.0)
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0: never clip", low=0.0)
    warmup: float = option(0.02, "share of the planned steps spent warming up", low=0.0, high=1.0)
    final_lr: float = option(0.01, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)
    ema_decay: float = option(0.999, "decay of the averaged weights; 0: none", low=0.0, high=0.999999)


@dataclass(frozen=True)
class Training(Section):
    """The loop."""

    epochs: int = option(30, "epochs", low=1)
    batch_size: int = option(256, "scenes a micro-batch", low=1)
    accumulate: int = option(1, "micro-batches an optimizer step", low=1)
    precision: str = option(
        "fp32",
        "arithmetic of the network; fp32: without TF32; bf16, fp16: of its products, weights stay fp32; the loss is"
        " always fp32; auto: bf16 where it is measured to pay",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    max_seconds: float = option(0.0, "stop after this many seconds and anneal towards it; 0: no limit", low=0.0)
    seed: int = option(
        0, "seed of the weights and of the order of the scenes; the scenes themselves have data.seed", low=0
    )
    init: str = option(
        "", "start from the weights of this run or checkpoint, of the same network; empty: from random ones"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = option(True, "compile forward and backward with torch.compile")
    capture: bool = option(True, "on CUDA, run each step and each validation as one captured graph")
    backend: str = option(
        "auto", "kernels: best available, or the plain torch references", choices=("auto", "reference")
    )
    patience: int = option(0, "stop after this many epochs without a better validation NMSE; 0: never", low=0)
    max_skipped: int = option(10, "stop after this many non-finite steps in a row", low=1)


@dataclass(frozen=True)
class Health(Section):
    """How the run is watched."""

    preflight: bool = option(True, "check network, loss, step and scenes before the first step")
    stop: bool = option(True, "end a run in which a structural mistake is certain (exit code 4)")
    mute: str = option("", "names of findings that are not reported, with commas between them")
    frozen: str = option(
        "", "beginnings of the names of parameters that are meant to be frozen, with commas between them"
    )
    anomaly: bool = option(
        False, "where gradients that are not finite end a run, replay its last step and name the operation"
    )
    log_tensors: bool = option(False, "write a row per tensor and step to tensors.csv; beyond 64 MB one step a report")
    min_applied: float = option(
        0.9, "an epoch in which a smaller share of the steps is applied ends the run", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class Report(Section):
    """What a run writes."""

    every_steps: int = option(50, "write a row to metrics.jsonl every this many optimizer steps", low=1)
    checkpoint_seconds: float = option(
        60.0, "write the last checkpoint every this many seconds and at the end; 0: at the end alone", low=0.0
    )
    plots: bool = option(True, "draw loss curves into the run folder")
    tracker: str = option(
        "", "mirror the rows in tensorboard, trackio or wandb; several with commas between them; empty: in none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in words(self.tracker):
            if name not in TRACKERS:
                raise ConfigError(f"report.tracker: there is no tracker '{name}'.{did_you_mean(name, TRACKERS)}")


@dataclass(frozen=True)
class Config:
    """A whole run. `provenance` maps 'section.key' to where its value came from."""

    preset: str = "laptop"
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    health: Health = field(default_factory=Health)
    report: Report = field(default_factory=Report)
    provenance: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            if not isinstance(given := getattr(self, name), kind):
                raise ConfigError(
                    f"Config: {name} is {given!r} ({type(given).__name__}); expected"
                    f" ris_fast.config.schema.{kind.__name__}. Make it with {kind.__name__}(...), or the whole with"
                    " ris_fast.load_config(...)."
                )


SECTIONS: dict[str, type] = {
    "task": Task,
    "data": Data,
    "model": Model,
    "loss": Loss,
    "optimizer": Optimizer,
    "training": Training,
    "health": Health,
    "report": Report,
}


def section_of(who: str, name: str, value: Any, kind: type) -> Any:
    """The value, which must be a section of the configuration. Raises: ConfigError that says which, and how to have
    one."""
    if isinstance(value, kind):
        return value
    whole = isinstance(value, Config)
    raise ConfigError(
        f"{who}: {name} is a {type(value).__name__}, expected a {kind.__name__}. "
        + (
            f"Pass config.{kind.__name__.lower()}."
            if whole
            else f"Make one with ris_fast.config.schema.{kind.__name__}(...)."
        )
    )
