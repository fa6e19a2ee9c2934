"""Which device a run uses, and whether its network is compiled there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config, ConfigError
from ris_fast.config.user_code import first_line
from ris_fast.models.own import OwnNetwork
from ris_fast.models.prediction import Prediction

REMEMBERED_BYTES = 2**30


def choose_device(name: str, setting: str = "training.device") -> torch.device:
    """`auto` is the GPU where there is one; `setting` is what an error calls it.

    Raises: ConfigError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{setting} is '{name}'; expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{setting} is '{name}'; kernels exist for cpu and cuda.")
    if device.type == "cpu":
        if device.index:
            raise ConfigError(f"{setting} is '{name}'; there is one CPU. Write cpu.")
        return torch.device("cpu")  # cpu:0 would not equal cpu
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        todo = (
            f"There are cuda:0 to cuda:{count - 1}." if count else "Use --device cpu, or install a CUDA build of torch."
        )
        raise ConfigError(f"{setting} is '{name}', but torch {torch.__version__} sees {count} CUDA devices. {todo}")
    return device


class Network:
    """A model as the step calls it: its features, which hold no parameter, then its trunk, compiled or not.

    Only the trunk is compiled: features are few large operators that no compiler improves, and validation reuses them.
    It is compiled once, for training steps of `batch_size` scenes (of any number where None, each anew). What is rare,
    the ragged batch at the end of an epoch and validation, runs as written: no compilation would earn its time there.
    """

    def __init__(self, model: nn.Module, compile: bool, batch_size: int | None = None) -> None:
        self.features, self.as_written, self.batch_size = model.features, model.trunk, batch_size
        self.trunk = torch.compile(model.trunk, fullgraph=True, dynamic=False) if compile else self.as_written
        self.own = isinstance(model, OwnNetwork)
        self.ready = False  # a first call has compiled it
        self.known: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        usual = torch.is_grad_enabled() and self.batch_size in (None, snapshots.shape[0])
        return (self.trunk if usual else self.as_written)(self.inputs(snapshots, channel, codes, snr_db))

    @property
    def compiled(self) -> bool:
        return self.trunk is not self.as_written

    def inputs(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, ...]:
        """The features, from memory where they are remembered."""
        features = self.known.get(id(snapshots))
        return self.features(snapshots, channel, codes, snr_db) if features is None else features

    def remember(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> None:
        """Keeps the features of scenes that are shown again and again, while they stay under a GiB altogether.

        `snapshots` must live as long as this network: scenes are known by it.
        """
        features = self.features(snapshots, channel, codes, snr_db)
        held = sum(each.nbytes for known in self.known.values() for each in known)
        if held + sum(each.nbytes for each in features) <= REMEMBERED_BYTES:
            self.known[id(snapshots)] = features


def compiled(model: nn.Module, config: Config, device: torch.device) -> tuple[Network, str]:
    """The network of a run, and one line that says whether it was compiled, and if not, why."""
    if not config.training.compile:
        return Network(model, False), "eager, as asked"
    missing = missing_compiler(device)
    if missing:
        return Network(model, False), f"eager: {missing}"
    return Network(model, True, config.training.batch_size), "compiled with torch.compile"


def compile_now(network: Network, train: Callable[[], None], device: torch.device) -> str:
    """Compiles by a first call of `train`, forward and backward of one full batch. Returns the note: how long it took.

    Where compilation fails the network is left as written, and the note says why; an error that is not the compiler's
    is raised.
    """
    began = time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="torch"
        )  # what torch's compiler says to its authors
        warnings.filterwarnings("ignore", message="TensorFloat32")  # fp32 was asked for
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # torch looks at it between graphs
        broken = ""
        try:
            train()
        except Exception as error:  # compilers raise anything; whose fault it is shows when the same runs without
            failed = _compile_in_parts(network, train) if network.own else error
            if failed is not None:
                network.trunk = network.as_written
                train()
                return f"eager: compilation failed ({(str(failed) or type(failed).__name__).strip().splitlines()[0]})"
            broken = f", in parts, because the network cannot be compiled whole ({first_line(error)})"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    network.ready = True
    return f"compiled with torch.compile in {time.monotonic() - began:.1f} s{broken}"


def _compile_in_parts(network: Network, train: Callable[[], None]) -> Exception | None:
    """What a network of the user's own does between two graphs runs as written. Returns: why even that failed."""
    network.trunk = torch.compile(network.as_written, dynamic=False)
    try:
        train()
    except Exception as error:
        return error
    return None


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed, which torch.compile needs on a GPU"
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found, which torch.compile needs on a CPU (Debian, Ubuntu: apt-get install g++)"
    return None
