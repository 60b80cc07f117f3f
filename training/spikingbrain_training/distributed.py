"""Everything DeepSpeed: the process group, the engine with every option written out, and access to its parts."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikingbrain.errors import InputError
from spikingbrain.files import read_json

from .collectives import Group, make_group
from .config import Optim, TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
TIMEOUT = timedelta(minutes=30)
# glibc's numbers for them, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class World(NamedTuple):
    """This process among all. `sequence`: the ranks that share its sequences, `expert`: its experts; None: it alone."""

    rank: int
    size: int
    device: torch.device
    sequence: Group | None = None
    expert: Group | None = None

    @property
    def replica(self) -> tuple[int, int]:
        """Which of how many shares of a batch is this process's; ranks of a sequence have the same."""
        shared = self.sequence.size if self.sequence else 1
        return self.rank // shared, self.size // shared


def start(out: Path, sequence: int = 1, expert: int = 1) -> World:
    """Join the process group (gloo on CPU, nccl on GPU) of the launcher, or make one of this process alone.

    `sequence` neighbouring ranks have each sequence together, `expert` neighbouring ranks the experts.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
        # Of port 0 the store makes one that is free; nobody else needs to know it.
        os.environ.setdefault("MASTER_PORT", "0")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
        _keep_memory()
    deepspeed = _import_deepspeed(out, gpu)
    deepspeed.init_distributed("nccl" if gpu else "gloo", timeout=TIMEOUT, verbose=False)
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    rank = int(os.environ["RANK"])
    groups = (make_group(rank, size, width) if width > 1 else None for width in (sequence, expert))
    return World(rank, size, device, *groups)


def leave() -> None:
    """Leave the process group, where all processes end: its threads must not outlive the interpreter, which aborts.

    Not after an error of one process alone: with nccl it would wait for the others.
    """
    from deepspeed import comm

    comm.destroy_process_group()


def _keep_memory() -> None:
    """Let the C library keep what a step frees for the next step.

    It would give large tensors back at once, and the kernel would map and clear them again: a tenth of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


def _import_deepspeed(out: Path, gpu: bool) -> Any:
    """DeepSpeed without just-in-time builds: they need a compiler, and a killed one leaves a lock that hangs others."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(out / "extensions")
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import logging
    import warnings

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by their former names, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings; those whose defaults surprise (clipping at 1, its own Adam) are written out."""
    zero: dict[str, Any] = {"stage": config.parallel.zero, "overlap_comm": False}
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.optim.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def make_engine(model: Any, config: TrainConfig, world: World, step: int, new: set[str]) -> Any:
    """The DeepSpeed engine around `model`, with torch's own AdamW, as after `step` steps with moments of zero.

    `new`: names of the parameters that learn at `optim.new_lr`.
    """
    import deepspeed

    if config.parallel.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = parameter_groups(model, config.optim, new)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas)
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device),
        optimizer=optimizer,
        config=deepspeed_config(config, world.size),
        dist_init_required=False,
    )
    _prepare_state(engine, step)
    return engine


def new_parameters(source: Path) -> set[str]:
    """Names of the parameters that conversion added; none where the model was not converted."""
    report = source / "conversion.json"
    return set(read_json(report)["new_parameters"]) if report.exists() else set()


def parameter_groups(model: nn.Module, optim: Optim, new: set[str]) -> list[dict[str, Any]]:
    """Groups by learning rate and weight decay (matrices decay, vectors do not); each keeps its peak rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = optim.new_lr if optim.new_lr and name in new else optim.lr
        rate = optim.neuron_lr if optim.neuron_lr and ".neuron." in name else rate
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def take_step(engine: Any) -> float | None:
    """End a micro batch; after a step's last one returns the norm that the gradients had before clipping."""
    norm = None
    if not engine.zero_optimization() and engine.is_gradient_accumulation_boundary():
        # DeepSpeed without ZeRO keeps this to itself.
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return None if norm is None else float(norm)


def total(world: World, *values: float) -> list[float]:
    """The sums of `values` over all processes."""
    sums = torch.tensor(values, dtype=torch.float64, device=world.device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def largest(world: World, *values: int) -> list[int]:
    """The largest of each of `values` over all processes."""
    numbers = torch.tensor(values, device=world.device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return numbers.tolist()


def from_first_rank(world: World, work: Callable[[], Any]) -> Any:
    """What `work()` gives on rank 0, on every process."""
    result = [work() if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(result)
    return result[0]


def on_first_rank(world: World, work: Callable[[], None]) -> None:
    """Rank 0 does `work()`; all raise what it met, a full disk say, so that none waits for a process that is gone."""
    outcome: list[OSError | InputError | None] = [None]
    if world.rank == 0:
        try:
            work()
        except (OSError, InputError) as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def everywhere(world: World, value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


def raise_anywhere(world: World, error: OSError | None) -> None:
    """Raise on every process what any of them met."""
    for met in everywhere(world, error):
        if met is not None:
            raise met


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the model stores besides parameters (the experts' balance) by name; the same on every process."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def local_pieces(
    engine: Any, world: World, *, everywhere: bool = False
) -> Iterator[tuple[str, torch.Size, int, dict[str, Tensor]]]:
    """Each parameter's name, its shape, and the run of flattened elements whose fp32 master and moments are here.

    As `start` and, by part, views `[n]` (none: nothing is here). Without ZeRO every process has all: they share the
    parameters among them, or, `everywhere`, each gives all.
    """
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        if hasattr(parameter, "ds_id"):
            yield name, parameter.ds_shape, *_stage_3_piece(parameter, world)
        elif engine.zero_optimization():
            yield name, parameter.shape, *_stage_1_piece(parameter)
        elif everywhere or number % world.size == world.rank:
            state = engine.optimizer.state[parameter]
            parts = {"master": parameter.detach().flatten(), **{part: state[part].flatten() for part in MOMENTS}}
            yield name, parameter.shape, 0, parts
        else:
            yield name, parameter.shape, 0, {}


def _stage_1_piece(parameter: Any) -> tuple[int, dict[str, Tensor]]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    parts = {part: mapping.get_hp_fragment(part).flatten() for part in MOMENTS}
    return mapping.lp_fragment_address.start, {"master": mapping.get_hp_fragment().flatten(), **parts}


def _stage_3_piece(parameter: Any, world: World) -> tuple[int, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    share = parameter.ds_tensor.ds_numel
    start = share * world.rank
    # The last shares are padded.
    count = max(0, min(share, parameter.ds_numel - start))
    parts = {part: safe_get_local_optimizer_state(parameter, part)[:count] for part in MOMENTS}
    return start, {"master": safe_get_local_fp32_param(parameter)[:count], **parts}


def set_moment(engine: Any, name: str, part: str, values: Tensor) -> None:
    """Write to this process's run of elements of a moment, as `local_pieces` gives it."""
    from deepspeed.utils import safe_set_local_optimizer_state

    parameter = engine.module.get_parameter(name)
    values = values.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        padding = parameter.ds_tensor.ds_numel - len(values)
        safe_set_local_optimizer_state(parameter, torch.nn.functional.pad(values, (0, padding)), part)
    elif engine.zero_optimization():
        parameter._hp_mapping.get_hp_fragment(part).copy_(values)
    else:
        engine.optimizer.state[parameter][part].copy_(values.view_as(parameter))


def _prepare_state(engine: Any, step: int) -> None:
    """Give Adam its moments and step count before its first step.

    DeepSpeed would connect parameters to moments after the first parameter group's first step, when the other groups
    have none yet, and never again.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for master in _masters(engine, optimizer):
        optimizer.state[master] = {
            "step": torch.tensor(float(step)),
            **{name: torch.zeros_like(master, dtype=torch.float32) for name in MOMENTS},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _masters(engine: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors the inner optimizer steps on: ZeRO's flat partitions, or the parameters."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
