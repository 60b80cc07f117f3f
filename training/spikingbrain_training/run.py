"""A run's directory: whether a config may begin or go on there, and whether all that it reads can be read."""

from pathlib import Path

from spikingbrain.checkpoint import Shards, load_config, load_tokenizer
from spikingbrain.config import SpikingBrainConfig
from spikingbrain.errors import InputError
from spikingbrain.files import read_json, write_json

from . import checkpoint
from .comparison import flat
from .config import TrainConfig
from .data import Mixture, open_data
from .directory import ARCHITECTURE, CONFIG, MODEL, is_run
from .distributed import new_parameters
from .stages import prepare_start, student_config

# What says where and on how many processes a run computes, not what.
LAYOUT = ("out", "batch.micro", "parallel.", "checkpoint.", "watch.", "faults.")


def begin_run(config: TrainConfig) -> str:
    """Make or accept the run directory; returns a line about what goes on.

    Raises `InputError`, having written nothing, if the directory holds a run with other settings (naming the keys) or
    something else, or if the run could not read its inputs.
    """
    if (config.out / CONFIG).exists():
        _require_same(config)
    elif config.out.exists() and any(config.out.iterdir()):
        raise InputError(f"{config.out} is not empty and holds no run; choose another out")
    if (config.out / MODEL).exists():
        return f"{config.out}: finished before, model in {config.out / MODEL}"
    check_inputs(config)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / CONFIG, config.model_dump(mode="json"))
    student_config(config).save_pretrained(config.out / ARCHITECTURE)
    prepare_start(config)
    step, complaints = checkpoint.newest_good(config.out)
    checkpoint.discard_unfinished(config.out, step)
    return "; ".join([f"{config.out}: from step {step} to {config.steps}", *complaints])


def _require_same(config: TrainConfig) -> None:
    ours, theirs = flat(config.model_dump(mode="json")), flat(read_json(config.out / CONFIG))
    settings = {key for key in {*ours, *theirs} if not key.startswith(LAYOUT)}
    different = sorted(key for key in settings if ours.get(key) != theirs.get(key))
    if different:
        raise InputError(f"{config.out} holds a run with another {', '.join(different)}; choose another out")


def check_inputs(config: TrainConfig) -> None:
    """Open all that the run will read: what is wrong is said once, before processes start and anything is written."""
    vocabulary = student_config(config).vocab_size
    source = config.model.init_from
    for path in (source, config.teacher):
        if path and path.is_dir() and not is_run(path):
            Shards(path)
    if config.parallel.sequence > 1:
        _require_pieces(config)
    if config.parallel.expert > 1:
        _require_experts(config)
    if config.model.tokenizer:
        load_tokenizer(config.model.tokenizer)
    if config.optim.new_lr and not (config.model.mixers or new_parameters(source)):
        raise InputError(f"optim.new_lr is set, but no conversion.json in {source} names new parameters")
    if config.teacher:
        _require_vocabulary(config.teacher, vocabulary)
    _require_known_tokens(config, vocabulary)


def _require_known_tokens(config: TrainConfig, vocabulary: int) -> None:
    samples = open_data(config.data, config.seed, checksums=True)
    for dataset in samples.datasets if isinstance(samples, Mixture) else [samples]:
        known = dataset.index["vocabulary"]
        if known > vocabulary:
            raise InputError(f"{dataset.path} was built with {known} tokens, the model knows {vocabulary}")


def _require_pieces(config: TrainConfig) -> None:
    """Only our models can read a part of a sequence."""
    models = {config.model.init_from: student_config(config)}
    if config.teacher:
        models[config.teacher] = load_config(config.teacher)
    for path, known in models.items():
        if not isinstance(known, SpikingBrainConfig):
            raise InputError(
                f"parallel.sequence: {path} is a {known.model_type} model; only ours read parts of sequences"
            )


def _require_experts(config: TrainConfig) -> None:
    experts = (getattr(student_config(config), "moe", None) or {}).get("num_experts", 0)
    if not experts or experts % config.parallel.expert:
        raise InputError(f"parallel.expert: {config.parallel.expert} ranks cannot share {experts} experts evenly")


def _require_vocabulary(teacher: Path, vocabulary: int) -> None:
    known = load_config(teacher).vocab_size
    if known != vocabulary:
        raise InputError(f"the teacher {teacher} knows {known} tokens, the student {vocabulary}")
